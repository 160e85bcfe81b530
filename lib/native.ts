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

export interface NativeStream {
  sync(): Promise<void>;
  close(): void;
  memory(): NativeMemory;
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
}

type TypedArray = Float32Array | Uint16Array | Int32Array | Uint8Array | Int8Array;

export interface NativeTensor {
  write(data: TypedArray): Promise<void>;
  read(): Promise<TypedArray>;
  view(shape: readonly number[]): NativeTensor;
  dispose(): void;
}

/** What an operation takes: tensors, lists of them, null for one left out, numbers. In the order of its C++ `visit`. */
export type NativeArgument = NativeTensor | readonly NativeTensor[] | number | null | undefined;

interface Addon {
  Stream: new (purpose?: 'rehearsal') => NativeStream;
  Tensor: new (stream: NativeStream, dtype: string, shape: readonly number[], memoryClass: string) => NativeTensor;
  ops: Record<string, (stream: NativeStream, ...args: NativeArgument[]) => void>;
  processMemory(): NativeMemory;
  cpu(): { instructionSets: string[]; inUse: string; chosen: string; threads: number };
}

function load(): Addon {
  const root = fileURLToPath(new URL('../../', import.meta.url));
  const require = createRequire(import.meta.url);
  try {
    return (require('node-gyp-build') as (root: string) => Addon)(root);
  } catch (cause) {
    throw new QLoRAError('ERR_QLORA_ADDON', `the native addon could not be loaded: ${(cause as Error).message}`, {
      hint: 'In a checkout run `npm install`; elsewhere see README for the platforms that have a prebuilt addon.',
      cause,
    });
  }
}

/** An error of the addon as a QLoRAError; anything else as it is. */
function wrapError(error: unknown): unknown {
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
