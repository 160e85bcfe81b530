/** The addon: loaded once, its errors turned into QLoRAError. Only tensor.ts, ops/ and io/ come here. */
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';
import { QLoRAError } from './errors.js';

export interface NativeMemory {
  liveBytes: number;
  peakBytes: number;
  byClass: Record<string, number>;
  peakByClass: Record<string, number>;
}

export interface NativeCuda {
  /** By their numbers. */
  devices: NativeCudaDevice[];
  /** Operations that it does not have yet. */
  lacks: string[];
}

export type NativeCudaDevice =
  | { name: string; memoryBytes: number; capability: string; error?: undefined }
  /** One that cannot be used; the error as `wrapError` takes it. */
  | { error: Error };

export interface NativeStream {
  sync(): Promise<void>;
  close(): void;
  /** mappedBytes: what the allocator has taken of the device, in use or kept. */
  memory(): NativeMemory & { mappedBytes: number; pinnedBytes: number; pinnedPeakBytes: number };
  setMemoryLimit(bytes: number): void;
  usage(): Promise<StreamUsage>;
  record(enqueue: () => void): NativeRecording;
}

export interface NativeRecording {
  run(): void;
  dispose(): void;
}

/** What a stream has done. */
export interface StreamUsage {
  /** Of each operation since this was last asked: its calls, and what they took in all. */
  operations: Record<string, { calls: number; seconds: number }>;
  /** Pages that the system has given to the stream's thread since it began; 0 where it does not count them. */
  minorFaults: number;
  /** Kernels that it has enqueued to its device since it began, or made part of a graph; 0 on the CPU. */
  kernels: number;
}

type TypedArray = Float32Array | Uint16Array | Int32Array | Uint8Array | Int8Array;

declare const tensor: unique symbol;
/** A handle of the addon. That of a tensor that was disposed of may become another's. */
export interface NativeTensor {
  readonly [tensor]: true;
}

/** Dtypes, memory classes and places by their numbers in csrc/core. */
export interface NativeTensors {
  /** `spare`: a handle to use again; undefined for a new one. */
  make(
    spare: NativeTensor | undefined,
    stream: NativeStream,
    dtype: number,
    memoryClass: number,
    ...shape: number[]
  ): NativeTensor;
  view(spare: NativeTensor | undefined, of: NativeTensor, ...shape: number[]): NativeTensor;
  write(to: NativeTensor, data: TypedArray): Promise<void>;
  read(from: NativeTensor): Promise<TypedArray>;
  startMove(tensor: NativeTensor, to: number): void;
  finishMove(tensor: NativeTensor): void;
  dispose(tensor: NativeTensor): void;
}

/** What an operation takes: tensors, lists of them, null for one left out, numbers. In the order of its C++ `visit`. */
export type NativeArgument = NativeTensor | readonly NativeTensor[] | number | null | undefined;

interface Addon {
  /** cuda: the device's number; undefined on the CPU. */
  Stream: new (
    cuda?: number,
    purpose?: 'rehearsal',
  ) => NativeStream;
  tensors: NativeTensors;
  ops: Record<string, (stream: NativeStream, ...args: NativeArgument[]) => void>;
  processMemory(): NativeMemory;
  cpu(): { instructionSets: string[]; inUse: string; chosen: string; threads: number };
  /** Throws where CUDA cannot be used. */
  cuda(): NativeCuda;
  /** What the device has free at this moment. Throws where it cannot be used. */
  cudaFreeBytes(index: number): number;
  /** Of the devices that this process has opened. */
  cudaMemory(): (NativeMemory & { index: number })[];
  /** Whether there is one, whether or not it can be used. */
  cudaDriver(): boolean;
}

function load(): Addon {
  const root = fileURLToPath(new URL('../../', import.meta.url));
  const require = createRequire(import.meta.url);
  try {
    return findAddon(require)(root);
  } catch (cause) {
    throw new QLoRAError('ERR_QLORA_ADDON', `the native addon could not be loaded: ${(cause as Error).message}`, {
      hint: 'In a checkout run `npm install`; elsewhere see README for the platforms that have a prebuilt addon.',
      cause,
    });
  }
}

/** By node-gyp-build; where it is not installed, as when the built files alone are carried to a machine, from the build. */
function findAddon(require: NodeJS.Require): (root: string) => Addon {
  try {
    return require('node-gyp-build');
  } catch (error) {
    if ((error as { code?: unknown }).code !== 'MODULE_NOT_FOUND') throw error;
    return (root) => require(`${root}build/Release/qlora_node.node`);
  }
}

/** An error of the addon as a QLoRAError; anything else as it is. */
export function wrapError(error: unknown): unknown {
  const { code, hint, message } = error as { code?: unknown; hint?: string; message?: string };
  if (error instanceof QLoRAError || typeof code !== 'string' || !code.startsWith('ERR_QLORA_')) return error;
  return new QLoRAError(code as QLoRAError['code'], message ?? code, { hint, cause: error });
}

/** Calls the addon; what it throws or rejects with becomes a QLoRAError. */
export function guard<T>(call: () => T): T {
  try {
    const result = call();
    if (result instanceof Promise) return result.catch((error) => Promise.reject(wrapError(error))) as T;
    return result;
  } catch (error) {
    throw wrapError(error);
  }
}

export const native = load();
