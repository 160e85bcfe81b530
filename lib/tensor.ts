/** Streams and tensors: handles to what the addon holds. Operations on them are in ops/. */

import { QLoRAError } from './errors.js';
import type { NativeArgument, NativeRecording, NativeStream, NativeTensor, StreamUsage } from './native.js';
import { guard, native } from './native.js';

export type FloatDType = 'f32' | 'bf16' | 'f16';
export type DType = FloatDType | 'i32' | 'u8' | 'i8';
export type MemoryClass = 'weights' | 'adapters' | 'optimizer' | 'activations' | 'scratch';
export type Device = 'cpu' | `cuda:${number}`;

/** As the addon numbers them. */
export const dtypeIndex: Readonly<Record<DType, number>> = { f32: 0, bf16: 1, f16: 2, i32: 3, u8: 4, i8: 5 };
const memoryClassIndex: Readonly<Record<MemoryClass, number>> = {
  weights: 0,
  adapters: 1,
  optimizer: 2,
  activations: 3,
  scratch: 4,
};
const placeIndex = { host: 0, device: 1 } as const;

export const bytesPerElement: Readonly<Record<DType, number>> = { f32: 4, bf16: 2, f16: 2, i32: 4, u8: 1, i8: 1 };

const cudaIndex = (device: Device) => Number(device.slice('cuda:'.length));

type Argument = Tensor | readonly Tensor[] | number | null | undefined;

/** A queue of operations with a thread of its own and memory that it counts. One a model. */
export class Stream {
  readonly #native: NativeStream;
  readonly #shared = new Map<string, Tensor>();
  /** Handles of tensors that were disposed of, for those to come: what a step makes V8 need not finalize. */
  readonly #spare: NativeTensor[] = [];
  #closing: Promise<void> | undefined;

  /**
   * @param purpose 'rehearsal' computes nothing, and counts the memory that computing would take
   * @throws QLoRAError `ERR_QLORA_DEVICE` where the device cannot be used
   */
  constructor(
    readonly device: Device = 'cpu',
    readonly purpose?: 'rehearsal',
  ) {
    const cuda = device === 'cpu' ? undefined : cudaIndex(device);
    this.#native = guard(() => new native.Stream(cuda, purpose));
  }

  get handle(): NativeStream {
    return this.#native;
  }

  /** @internal A handle to use again, if there is one. */
  takeSpare(): NativeTensor | undefined {
    return this.#spare.pop();
  }

  /** @internal Nobody may use this handle any more. */
  disposeOf(handle: NativeTensor): void {
    native.tensors.dispose(handle);
    this.#spare.push(handle);
  }

  /** Enqueues an operation of the addon's table. Tensors are passed as they are, null where one is left out. */
  run(op: string, ...args: Argument[]): void {
    const call = native.ops[op];
    if (!call) throw new QLoRAError('ERR_QLORA_INTERNAL', `the addon has no operation '${op}'`);
    guard(() => call(this.#native, ...args.map(nativeArgument)));
  }

  /**
   * The operations that `enqueue` enqueues, without running them. They read and write the same tensors each time, which
   * stay allocated, disposed of or not; reads and writes cannot be recorded.
   */
  record(enqueue: () => void): Recording {
    return new Recording(guard(() => this.#native.record(enqueue)));
  }

  /** What its kernels are compiled for: another one may give other bits. */
  get instructionSet(): string {
    if (this.device === 'cpu') return native.cpu().inUse;
    const device = guard(() => native.cuda()).devices[cudaIndex(this.device)];
    return `cuda ${device?.error ? undefined : device?.capability}`;
  }

  /** Resolves when everything enqueued so far has run. */
  sync(): Promise<void> {
    return guard(() => this.#native.sync());
  }

  /**
   * `mappedBytes`: what the allocator has taken of the device, in use or kept. `pinnedBytes`, and at most: what tensors
   * of a device have of the host's memory.
   */
  memory(): ReturnType<NativeStream['memory']> {
    return this.#native.memory();
  }

  /** What it has done, once everything enqueued so far has run. */
  usage(): Promise<StreamUsage> {
    return guard(() => this.#native.usage());
  }

  /** Allocations that would take the live bytes above it fail with ERR_QLORA_OUT_OF_MEMORY; 0 is no limit. */
  setMemoryLimit(bytes: number): void {
    this.#native.setMemoryLimit(bytes);
  }

  get closed(): boolean {
    return this.#closing !== undefined;
  }

  /** The tensor of that name, which all that computes here shares: made when first asked for, kept as long as the stream. */
  shared(name: string, make: () => Tensor): Tensor {
    const tensor = this.#shared.get(name) ?? make();
    this.#shared.set(name, tensor);
    return tensor;
  }

  /** Runs what was enqueued, then ends the thread. What is enqueued meanwhile is dropped: ERR_QLORA_DISPOSED. */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    for (const tensor of this.#shared.values()) tensor.dispose();
    try {
      await this.sync();
    } finally {
      this.#spare.length = 0;
      this.#native.close();
    }
  }
}

/** Operations that are enqueued again by one call. To be disposed of. */
export class Recording implements Disposable {
  readonly #native: NativeRecording;

  constructor(native: NativeRecording) {
    this.#native = native;
  }

  run(): void {
    guard(() => this.#native.run());
  }

  [Symbol.dispose](): void {
    this.#native.dispose();
  }
}

/**
 * A row-major array on a stream. Its memory is allocated when the operation that fills it runs, and freed in the
 * stream's order after `dispose()`: while the tape holds it for a backward rule it stays.
 */
export class Tensor implements Disposable {
  readonly size: number;
  /** Whether a gradient is to be computed for it: set on parameters, and by the tape on what depends on them. */
  requiresGrad = false;
  /** Of a parameter that is trained: f32, same shape; backward rules add to it. */
  gradient: Tensor | undefined;
  /** undefined once its memory was let go of. */
  #handle: NativeTensor | undefined;
  #holds = 0;
  #disposed = false;

  constructor(
    readonly stream: Stream,
    readonly dtype: DType,
    readonly shape: readonly number[],
    readonly memoryClass: MemoryClass = 'activations',
    handle?: NativeTensor,
  ) {
    this.size = shape.reduce((n, d) => n * d, 1);
    this.#handle = handle ?? guard(() => makeHandle(stream, dtype, shape, memoryClass));
  }

  /** A tensor that holds `data`. f32 from numbers may be given any float dtype by an op; bits are taken as they are. */
  static from(
    stream: Stream,
    data: Float32Array | Int32Array | Uint8Array | Int8Array,
    shape: readonly number[],
    memoryClass: MemoryClass = 'activations',
  ): Tensor {
    const dtype: DType =
      data instanceof Float32Array
        ? 'f32'
        : data instanceof Int32Array
          ? 'i32'
          : data instanceof Uint8Array
            ? 'u8'
            : 'i8';
    const tensor = new Tensor(stream, dtype, shape, memoryClass);
    // A failed write is passed on to whoever reads the tensor.
    tensor.write(data).catch(() => {});
    return tensor;
  }

  /** @throws QLoRAError `ERR_QLORA_DISPOSED` */
  get handle(): NativeTensor {
    if (!this.#handle) throw new QLoRAError('ERR_QLORA_DISPOSED', 'this tensor was disposed of');
    return this.#handle;
  }

  /** The dimension at i; negative counts from the end. */
  dim(i: number): number {
    return this.shape.at(i) as number;
  }

  /** Elements over the last dimension. */
  get rows(): number {
    const columns = this.shape.length ? this.dim(-1) : 1;
    return columns ? this.size / columns : 1;
  }

  /** An array larger than 1 MiB is read when the stream comes to it: leave it alone until the promise resolves. */
  write(data: Float32Array | Uint16Array | Int32Array | Uint8Array | Int8Array): Promise<void> {
    return guard(() => native.tensors.write(this.handle, data));
  }

  /** The values once everything enqueued before has run. 16-bit floats come widened to fp32. */
  async read(): Promise<Float32Array> {
    const raw = await this.readBits();
    if (this.dtype === 'bf16') return widenBf16(raw as Uint16Array);
    if (this.dtype === 'f16') return widenF16(raw as Uint16Array);
    return raw instanceof Float32Array ? raw : Float32Array.from(raw);
  }

  /** The stored elements as they are; 16-bit floats as Uint16Array. */
  readBits(): Promise<Float32Array | Uint16Array | Int32Array | Uint8Array | Int8Array> {
    return guard(() => native.tensors.read(this.handle));
  }

  /** The same memory in another shape of the same size. Its handle is disposed of on its own. */
  view(shape: readonly number[]): Tensor {
    const { stream, dtype, memoryClass, handle: source } = this;
    const handle = guard(() => native.tensors.view(stream.takeSpare(), source, ...shape));
    const view = new Tensor(stream, dtype, shape, memoryClass, handle);
    view.requiresGrad = this.requiresGrad;
    return view;
  }

  /**
   * On a device: its bytes set out for pinned memory of the host, or back, beside what is enqueued from here on. On the
   * way to the host it may still be read; away and on the way back it may not.
   */
  startMove(to: 'host' | 'device'): void {
    guard(() => native.tensors.startMove(this.handle, placeIndex[to]));
  }

  /** What is enqueued from here on comes after the move; its source is free. Nothing where none is under way. */
  finishMove(): void {
    guard(() => native.tensors.finishMove(this.handle));
  }

  /** Keeps the memory until `release()`, whatever happens to the handle. For the tape. */
  hold(): this {
    this.#holds++;
    return this;
  }

  release(): void {
    if (--this.#holds === 0 && this.#disposed) this.#letGo();
  }

  get disposed(): boolean {
    return this.#disposed;
  }

  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    if (this.#holds === 0) this.#letGo();
    this.gradient?.dispose();
  }

  #letGo(): void {
    if (!this.#handle) return;
    this.stream.disposeOf(this.#handle);
    this.#handle = undefined;
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}

function nativeArgument(a: Argument): NativeArgument {
  if (a instanceof Tensor) return a.handle;
  return typeof a === 'object' && a ? a.map((t) => t.handle) : (a as number | null | undefined);
}

function makeHandle(stream: Stream, dtype: DType, shape: readonly number[], memoryClass: MemoryClass): NativeTensor {
  const type = dtypeIndex[dtype];
  if (type === undefined) throw new QLoRAError('ERR_QLORA_ARGUMENT', `unknown dtype '${dtype}'`);
  return native.tensors.make(stream.takeSpare(), stream.handle, type, memoryClassIndex[memoryClass], ...shape);
}

function widenBf16(bits: Uint16Array): Float32Array {
  const out = new Float32Array(bits.length);
  const words = new Uint32Array(out.buffer);
  for (let i = 0; i < bits.length; i++) words[i] = (bits[i] as number) << 16;
  return out;
}

function widenF16(bits: Uint16Array): Float32Array {
  return Float32Array.from(bits, (h) => {
    const sign = h & 0x8000 ? -1 : 1;
    const exponent = (h >> 10) & 31;
    const mantissa = h & 1023;
    if (exponent === 0) return sign * mantissa * 2 ** -24;
    if (exponent === 31) return mantissa ? Number.NaN : sign * Number.POSITIVE_INFINITY;
    return sign * (1 + mantissa / 1024) * 2 ** (exponent - 15);
  });
}
