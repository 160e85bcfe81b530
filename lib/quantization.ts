/** Quantization of arrays, outside any model: byte for byte what bitsandbytes stores. */
import { didYouMean, QLoRAError } from './errors.js';
import { dequantizeWeight, dynamicBlockSize, fourBitCode, quantizeWeight } from './ops/quantize.js';
import { Weight, type WeightTensors } from './ops/weight.js';
import { type FloatDType, Stream, Tensor } from './tensor.js';

export interface QuantizeOptions {
  /** 4-bit NormalFloat, 4-bit float, or LLM.int8's rows. Default 'nf4'. */
  type?: 'nf4' | 'fp4' | 'int8';
  /** Elements that share a scale, of the 4-bit types; default 64. int8 has a scale a row. */
  blockSize?: 32 | 64 | 128 | 256 | 512 | 1024 | 2048 | 4096;
  /** Whether the scales of the 4-bit types are stored in 8 bits; default true. */
  doubleQuant?: boolean;
}
export type ResolvedQuantizeOptions = Required<QuantizeOptions>;

/** What `quantize` makes. Byte for byte what bitsandbytes stores. */
export interface QuantizedData {
  readonly type: 'nf4' | 'fp4' | 'int8';
  readonly shape: readonly number[];
  /** Elements that share a scale; of int8 the last dimension. */
  readonly blockSize: number;
  /** 4 bits: two codes a byte, the even element in the high nibble. int8: the bytes of the signed values. */
  readonly packed: Uint8Array;
  /** fp32 without double quantization, else the 8-bit indices. */
  readonly absmax: Float32Array | Uint8Array;
  /** With double quantization: absmax[i] is code[index[i]] * nested.absmax[i / 256] + offset. */
  readonly nested?: { absmax: Float32Array; code: Float32Array; offset: number; blockSize: 256 };
  /** Of codes and scales; the table of 256 and the offset, which do not grow, are left out. */
  readonly bitsPerWeight: number;
}

const types = ['nf4', 'fp4', 'int8'] as const;
const blockSizes = [32, 64, 128, 256, 512, 1024, 2048, 4096] as const;
const defaults: ResolvedQuantizeOptions = { type: 'nf4', blockSize: 64, doubleQuant: true };

/**
 * The options with their defaults.
 *
 * @param prefix of their names in messages
 * @throws ERR_QLORA_OPTION_UNKNOWN, ERR_QLORA_OPTION_INVALID
 */
export function resolveQuantizeOptions(options: QuantizeOptions = {}, prefix = ''): ResolvedQuantizeOptions {
  for (const name of Object.keys(options)) {
    if (Object.hasOwn(defaults, name)) continue;
    const near = didYouMean(name, Object.keys(defaults));
    throw new QLoRAError('ERR_QLORA_OPTION_UNKNOWN', `quantization has no option '${name}'`, {
      hint: near ? `Did you mean '${near}'?` : `Its options are ${Object.keys(defaults).join(', ')}.`,
      detail: { option: name },
    });
  }
  const { type = defaults.type, blockSize = defaults.blockSize, doubleQuant = defaults.doubleQuant } = options;
  checkOneOf(`${prefix}type`, type, types);
  checkOneOf(`${prefix}blockSize`, blockSize, blockSizes);
  checkOneOf(`${prefix}doubleQuant`, doubleQuant, [true, false]);
  return { type, blockSize, doubleQuant };
}

function checkOneOf(name: string, value: unknown, allowed: readonly unknown[]): void {
  if (allowed.includes(value)) return;
  throw new QLoRAError('ERR_QLORA_OPTION_INVALID', `${name} must be one of ${allowed.join(', ')}, got ${show(value)}`, {
    hint: (name.endsWith('type') ? typeByName(value) : undefined) ?? `Leave ${name} out for its default.`,
    detail: { option: name, value },
  });
}

/** What stands for a type where an object is to: its name, or what other programs say, as 4bit, int4, load_in_8bit. */
export function typeByName(value: unknown): string | undefined {
  if ((types as readonly unknown[]).includes(value)) return `Write { type: '${value}' }.`;
  const bits = /(?:^|\D)([48])(?:$|\D)/.exec(String(value))?.[1];
  return bits && `${bits} bits are type ${bits === '8' ? "'int8'" : "'nf4', the default, or 'fp4'"}.`;
}

function show(value: unknown): string {
  if (typeof value === 'object' && value !== null) return `an object (${value.constructor?.name})`;
  return typeof value === 'string' ? `'${value}'` : String(value);
}

function checkShape(shape: readonly number[]): number {
  if (Array.isArray(shape) && shape.length > 0 && shape.every((n) => Number.isSafeInteger(n) && n > 0)) {
    return shape.reduce((product, n) => product * n, 1);
  }
  const got = Array.isArray(shape) ? `[${shape.join(', ')}]` : show(shape);
  throw new QLoRAError('ERR_QLORA_SHAPE', `shape must be an array of positive integers, got ${got}`, {
    hint: 'Of a weight [N, K] pass [N, K].',
  });
}

type ArrayType = Float32ArrayConstructor | Uint8ArrayConstructor;

function checkArray(what: string, array: unknown, type: ArrayType, length: number): void {
  if (!(array instanceof type)) {
    throw new QLoRAError('ERR_QLORA_ARGUMENT', `${what} must be a ${type.name}, got ${show(array)}`, {
      hint: `Make one with ${type.name}.from().`,
    });
  }
  if (array.length !== length) {
    throw new QLoRAError('ERR_QLORA_SHAPE', `${what} must have ${length} elements, got ${array.length}`, {
      hint: 'Array and shape must belong together.',
      detail: { expected: length, actual: array.length },
    });
  }
}

/**
 * Quantizes an array, with every core. Leave `data` alone until the promise resolves.
 *
 * @param data row-major, finite
 * @param shape its dimensions, the last one varying fastest: [N, K] of a linear layer's weight. int8 has one scale for
 *   each index of all but the last.
 * @throws ERR_QLORA_SHAPE, ERR_QLORA_OPTION_UNKNOWN, ERR_QLORA_OPTION_INVALID, ERR_QLORA_ARGUMENT, and
 *   ERR_QLORA_NON_FINITE, which names the block or row, where data holds NaN, an infinity, or for int8 a value beyond fp16
 */
export async function quantize(
  data: Float32Array,
  shape: readonly number[],
  options?: QuantizeOptions,
): Promise<QuantizedData> {
  const resolved = resolveQuantizeOptions(options);
  const size = checkShape(shape);
  checkArray(`data of shape [${shape.join(', ')}]`, data, Float32Array, size);
  const { type } = resolved;
  const K = type === 'int8' ? (shape.at(-1) as number) : size;
  return withStream(async (stream) => {
    using x = new Tensor(stream, 'f32', [size / K, K]);
    x.write(data).catch(() => {}); // a failure is passed on to what is read below
    const weight = await quantizeWeight(x, resolved);
    try {
      const packed = new Uint8Array((await weight.tensors.data.readBits()).buffer);
      const absmax = (await (weight.tensors.absmax as Tensor).readBits()) as Float32Array | Uint8Array;
      const nested = await readNested(weight.tensors);
      const bytes = packed.byteLength + absmax.byteLength + (nested?.absmax.byteLength ?? 0);
      return {
        type,
        shape: [...shape],
        blockSize: type === 'int8' ? K : resolved.blockSize,
        packed,
        absmax,
        ...(nested && { nested }),
        bitsPerWeight: (8 * bytes) / size,
      };
    } finally {
      weight.dispose();
    }
  });
}

async function readNested(tensors: WeightTensors): Promise<QuantizedData['nested']> {
  const { nestedAbsmax, nestedCode, offset } = tensors;
  if (!nestedAbsmax || !nestedCode || offset === undefined) return undefined;
  const [absmax, code] = [await nestedAbsmax.read(), await nestedCode.read()];
  return { absmax, code, offset, blockSize: dynamicBlockSize };
}

/**
 * The values that quantized data stand for.
 *
 * @param dtype each value is rounded once to it; the array holds the results exactly. Default 'f32'.
 * @throws ERR_QLORA_SHAPE and ERR_QLORA_ARGUMENT where the parts do not fit together, ERR_QLORA_OPTION_INVALID
 */
export async function dequantize(data: QuantizedData, dtype: FloatDType = 'f32'): Promise<Float32Array> {
  checkOneOf('dtype', dtype, ['f32', 'bf16', 'f16']);
  checkOneOf('type', data.type, types);
  const size = checkShape(data.shape);
  return withStream(async (stream) => {
    const weight = data.type === 'int8' ? int8Weight(stream, data, size) : fourBitWeight(stream, data, data.type, size);
    using y = dequantizeWeight(weight, dtype);
    weight.dispose();
    return y.read();
  });
}

function int8Weight(stream: Stream, { shape, packed, absmax }: QuantizedData, size: number): Weight {
  const K = shape.at(-1) as number;
  checkArray('packed', packed, Uint8Array, size);
  checkArray('absmax of int8 data', absmax, Float32Array, size / K);
  const q = new Int8Array(packed.buffer, packed.byteOffset, packed.length);
  return new Weight(size / K, K, {
    data: Tensor.from(stream, q, [size / K, K]),
    absmax: Tensor.from(stream, absmax, [absmax.length]),
  });
}

function fourBitWeight(stream: Stream, data: QuantizedData, type: 'nf4' | 'fp4', size: number): Weight {
  const { blockSize, packed, absmax, nested } = data;
  checkOneOf('blockSize', blockSize, blockSizes);
  const blocks = Math.ceil(size / blockSize);
  checkArray('packed', packed, Uint8Array, Math.ceil(size / 2));
  checkArray(`absmax ${nested ? 'with' : 'without'} nested`, absmax, nested ? Uint8Array : Float32Array, blocks);
  if (nested) {
    checkArray('nested.absmax', nested.absmax, Float32Array, Math.ceil(blocks / dynamicBlockSize));
    checkArray('nested.code', nested.code, Float32Array, 256);
  }
  return new Weight(1, size, {
    data: Tensor.from(stream, packed, [packed.length]),
    absmax: Tensor.from(stream, absmax, [blocks]),
    code: fourBitCode(stream, type),
    blockSize,
    ...(nested && {
      nestedAbsmax: Tensor.from(stream, nested.absmax, [nested.absmax.length]),
      nestedCode: Tensor.from(stream, nested.code, [256]),
      offset: nested.offset,
    }),
  });
}

/** Runs body with a stream of its own. */
async function withStream<T>(body: (stream: Stream) => Promise<T>): Promise<T> {
  const stream = new Stream();
  try {
    return await body(stream);
  } finally {
    await stream.close();
  }
}
