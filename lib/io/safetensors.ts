/** safetensors files: strictly read, atomically written. The parser is native (csrc/core/safetensors.h). */
import { setImmediate } from 'node:timers/promises';
import { didYouMean, QLoRAError } from '../errors.js';
import { guard } from '../native.js';
import { bytesPerElement, type DType, Tensor } from '../tensor.js';
import { writeParts } from './atomic-file.js';
import { type NativeSafetensorsFile, nativeFile } from './native-file.js';

/** Every dtype of the format with the bits of an element, in the order in which files are sorted. */
export const safetensorsDTypes = {
  BOOL: 8,
  F4: 4,
  F6_E2M3: 6,
  F6_E3M2: 6,
  U8: 8,
  I8: 8,
  F8_E5M2: 8,
  F8_E4M3: 8,
  F8_E8M0: 8,
  F8_E4M3FNUZ: 8,
  F8_E5M2FNUZ: 8,
  I16: 16,
  U16: 16,
  F16: 16,
  BF16: 16,
  I32: 32,
  U32: 32,
  F32: 32,
  C64: 64,
  F64: 64,
  I64: 64,
  U64: 64,
} as const;
export type SafetensorsDType = keyof typeof safetensorsDTypes;

/** Which of them a tensor can hold, and as what. */
const tensorDTypes: Partial<Record<SafetensorsDType, DType>> = {
  F32: 'f32',
  BF16: 'bf16',
  F16: 'f16',
  I32: 'i32',
  U8: 'u8',
  I8: 'i8',
  BOOL: 'u8',
};
export const fileDTypes: Record<DType, SafetensorsDType> = {
  f32: 'F32',
  bf16: 'BF16',
  f16: 'F16',
  i32: 'I32',
  u8: 'U8',
  i8: 'I8',
};

export interface SafetensorsEntry {
  /** As the file has it. */
  readonly fileDType: SafetensorsDType;
  /** What a tensor that holds it has; undefined where we cannot load it. */
  readonly dtype: DType | undefined;
  readonly shape: readonly number[];
  /** First byte and end, from the start of the file's data. */
  readonly begin: number;
  readonly end: number;
}

/** Entries converted between two turns of the event loop: about a millisecond's work. */
const slice = 1000;

async function inSlices<T>(
  count: number,
  take: (from: number, to: number) => T[],
  each: (item: T) => void,
): Promise<void> {
  for (let from = 0; from < count; from += slice) {
    if (from > 0) await setImmediate();
    for (const item of guard(() => take(from, from + slice))) each(item);
  }
}

/** A file that is open. `close()` it; reads under way are finished first. */
export class SafetensorsFile implements Disposable {
  constructor(
    readonly path: string,
    readonly tensors: ReadonlyMap<string, SafetensorsEntry>,
    readonly metadata: ReadonlyMap<string, string>,
    private readonly handle: NativeSafetensorsFile,
  ) {}

  /** @throws ERR_QLORA_TENSOR_NOT_FOUND */
  entry(name: string): SafetensorsEntry {
    const entry = this.tensors.get(name);
    if (entry) return entry;
    const near = didYouMean(name, this.tensors.keys());
    throw new QLoRAError('ERR_QLORA_TENSOR_NOT_FOUND', `${this.path} holds no tensor '${name}'`, {
      hint: near ? `Did you mean '${near}'?` : `It holds ${this.tensors.size} tensors.`,
      detail: { path: this.path, name },
    });
  }

  /**
   * Fills `tensor` (same dtype and number of elements) with the bytes of tensor `name`, in the order of its stream. The
   * promise resolves when that has happened; operations enqueued meanwhile may already use the tensor.
   *
   * @throws ERR_QLORA_DTYPE, ERR_QLORA_SHAPE, ERR_QLORA_TENSOR_NOT_FOUND at once; ERR_QLORA_READ_FAILED by the promise,
   *   and by whatever reads the tensor.
   */
  read(name: string, tensor: Tensor): Promise<void> {
    this.check(name, tensor);
    return guard(() => this.handle.read(tensor.handle, this.entry(name).begin, name));
  }

  /** The same, and ERR_QLORA_NON_FINITE where a floating-point element is infinite or NaN. */
  readFinite(name: string, tensor: Tensor): Promise<void> {
    this.check(name, tensor);
    return guard(() => this.handle.readFinite(tensor.handle, this.entry(name).begin, name));
  }

  /** The same for a part: as many elements as `tensor` has, from element `offset` of tensor `name` on. */
  readFinitePart(name: string, tensor: Tensor, offset: number): Promise<void> {
    const { begin, end } = this.entry(name);
    this.checkDType(name, tensor);
    const size = bytesPerElement[tensor.dtype];
    if (!Number.isSafeInteger(offset) || offset < 0 || begin + (offset + tensor.size) * size > end) {
      throw new QLoRAError(
        'ERR_QLORA_SHAPE',
        `${this.path}: '${name}' has ${(end - begin) / size} elements, wanted were ${tensor.size} from ${offset} on`,
      );
    }
    return guard(() => this.handle.readFinite(tensor.handle, begin + offset * size, name));
  }

  /**
   * Fills `tensor` with the bytes of tensor `name`, whatever their dtypes; they must agree in bytes. For packed data that
   * a file calls bf16.
   */
  readBits(name: string, tensor: Tensor): Promise<void> {
    const { begin, end } = this.entry(name);
    const bytes = tensor.size * bytesPerElement[tensor.dtype];
    if (end - begin !== bytes) {
      throw new QLoRAError(
        'ERR_QLORA_SHAPE',
        `${this.path}: '${name}' has ${end - begin} bytes, the tensor to fill ${bytes}`,
      );
    }
    return guard(() => this.handle.read(tensor.handle, begin, name));
  }

  /** The bytes of a small tensor (at most 1 MiB), on no stream. */
  readBytes(name: string): Promise<Uint8Array> {
    const { begin, end } = this.entry(name);
    return guard(() => this.handle.readBytes(begin, end - begin));
  }

  close(): void {
    this.handle.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }

  private checkDType(name: string, tensor: Tensor): void {
    const { dtype, fileDType } = this.entry(name);
    if (dtype === tensor.dtype) return;
    throw new QLoRAError(
      'ERR_QLORA_DTYPE',
      `${this.path}: '${name}' is ${fileDType}, the tensor to fill ${tensor.dtype}`,
      {
        hint: dtype ? `Read it into a tensor of ${dtype} and cast that.` : `${fileDType} cannot be loaded.`,
      },
    );
  }

  private check(name: string, tensor: Tensor): void {
    this.checkDType(name, tensor);
    const { shape } = this.entry(name);
    if (shape.reduce((n, d) => n * d, 1) === tensor.size) return;
    throw new QLoRAError(
      'ERR_QLORA_SHAPE',
      `${this.path}: '${name}' has shape [${shape.join(', ')}], the tensor to fill [${tensor.shape.join(', ')}]`,
    );
  }
}

/**
 * Opens a safetensors file and checks its header, off the event loop.
 *
 * @throws ERR_QLORA_FILE_NOT_FOUND, ERR_QLORA_READ_FAILED, ERR_QLORA_SAFETENSORS
 */
export async function openSafetensors(path: string): Promise<SafetensorsFile> {
  const handle = new nativeFile.SafetensorsFile(path);
  await guard(() => handle.open());
  const count = handle.count();
  const tensors = new Map<string, SafetensorsEntry>();
  const metadata = new Map<string, string>();
  await inSlices(
    count.tensors,
    (from, to) => handle.tensors(from, to),
    ([name, type, shape, begin, end]) => {
      const fileDType = type as SafetensorsDType;
      tensors.set(name, { fileDType, dtype: tensorDTypes[fileDType], shape, begin, end });
    },
  );
  await inSlices(
    count.metadata,
    (from, to) => handle.metadata(from, to),
    ([key, value]) => metadata.set(key, value),
  );
  return new SafetensorsFile(path, tensors, metadata, handle);
}

/** What is written under one name. A typed array holds the stored elements: 16-bit floats as Uint16Array of their bits. */
export interface SafetensorsItem {
  readonly name: string;
  /** Left out with a tensor: its own. Needed with an array. */
  readonly dtype?: SafetensorsDType;
  /** Left out with a tensor: its own; with an array: one dimension. */
  readonly shape?: readonly number[];
  readonly data: Tensor | ArrayBufferView;
}

/**
 * Writes a safetensors file, byte for byte as the reference implementation does: tensors by descending alignment, then
 * name; the header padded to 8 bytes. Tensors are read in the order of their stream (they must share one). Atomic:
 * see writeParts.
 *
 * @throws ERR_QLORA_ARGUMENT (names, shapes that do not fit), ERR_QLORA_DISK_FULL, ERR_QLORA_WRITE_FAILED
 */
export async function writeSafetensors(
  path: string,
  items: readonly SafetensorsItem[],
  metadata: Readonly<Record<string, string>> = { format: 'pt' },
): Promise<void> {
  const rows = items.map(describe);
  rows.sort((a, b) => b.order - a.order || Buffer.compare(a.nameBytes, b.nameBytes));
  const header = safetensorsHeader(rows, metadata);
  await writeParts(path, [header, ...rows.map(({ data }) => (data instanceof Tensor ? data.handle : data))]);
}

/** What a header says of a tensor. */
export interface HeaderRow {
  readonly name: string;
  readonly dtype: SafetensorsDType;
  readonly shape: readonly number[];
  readonly bytes: number;
}

/** The bytes before the data of tensors that are written one after the other, in this order. @throws ERR_QLORA_ARGUMENT */
export function safetensorsHeader(rows: readonly HeaderRow[], metadata: Readonly<Record<string, string>>): Buffer {
  const fields: string[] = [];
  if (Object.keys(metadata).length) {
    for (const [key, value] of Object.entries(metadata)) {
      if (typeof value !== 'string') invalid(`metadata '${key}' must be a string`);
    }
    fields.push(`"__metadata__":${wellFormedJson(metadata)}`);
  }
  let offset = 0;
  const names = new Set<string>();
  for (const { name, dtype, shape, bytes } of rows) {
    if (names.has(name)) invalid(`'${name}' is given twice`);
    names.add(name);
    const entry = { dtype, shape, data_offsets: [offset, offset + bytes] };
    fields.push(`${wellFormedJson(name)}:${JSON.stringify(entry)}`);
    offset += bytes;
  }
  const text = Buffer.from(`{${fields.join(',')}}`);
  const header = Buffer.alloc(8 + Math.ceil(text.length / 8) * 8, ' ');
  header.writeBigUInt64LE(BigInt(header.length - 8));
  text.copy(header, 8);
  return header;
}

function describe({ name, data, ...given }: SafetensorsItem) {
  const dtype = given.dtype ?? (data instanceof Tensor ? fileDTypes[data.dtype] : undefined);
  const bits = dtype && safetensorsDTypes[dtype];
  if (!dtype || !bits) invalid(`'${name}' has ${dtype ? `an unknown dtype '${dtype}'` : 'no dtype'}`);
  if (name === '__metadata__') invalid("a tensor cannot be called '__metadata__'");
  const bytes = data instanceof Tensor ? data.size * bytesPerElement[data.dtype] : data.byteLength;
  const shape = given.shape ?? (data instanceof Tensor ? data.shape : [(bytes * 8) / bits]);
  const size = shape.reduce((n, d) => n * d, 1);
  if (!shape.every((d) => Number.isSafeInteger(d) && d >= 0) || size * bits !== bytes * 8) {
    invalid(`'${name}': shape [${shape.join(', ')}] of ${dtype} takes ${(size * bits) / 8} bytes, given are ${bytes}`);
  }
  return { name, dtype, shape, bytes, data, order: dtypeOrder.indexOf(dtype), nameBytes: Buffer.from(name) };
}

const dtypeOrder = Object.keys(safetensorsDTypes);

function invalid(message: string): never {
  throw new QLoRAError('ERR_QLORA_ARGUMENT', `writeSafetensors: ${message}`);
}

/** JSON of strings that are whole Unicode; a lone surrogate could not be read back. */
function wellFormedJson(value: unknown): string {
  const json = JSON.stringify(value);
  if (/\\ud[89a-f]/i.test(json.replaceAll('\\\\', ''))) invalid(`${json} holds half a surrogate pair`);
  return json;
}
