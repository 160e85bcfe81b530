/** What the addon offers for files (csrc/napi/file.cpp). */
import { type NativeStream, type NativeTensor, native } from '../native.js';

export type NativeTensorRow = [name: string, dtype: string, shape: number[], begin: number, end: number];

export interface NativeSafetensorsFile {
  open(): Promise<void>;
  count(): { tensors: number; metadata: number };
  tensors(from: number, to: number): NativeTensorRow[];
  metadata(from: number, to: number): [key: string, value: string][];
  read(tensor: NativeTensor, byteOffset: number, name: string): Promise<void>;
  readFinite(tensor: NativeTensor, byteOffset: number, name: string): Promise<void>;
  readBytes(byteOffset: number, bytes: number): Promise<Uint8Array>;
  close(): void;
}

export interface NativePageFile {
  open(): Promise<void>;
  /** dtype: its number, see tensor.ts */
  tensor(dtype: number, ...shape: number[]): NativeTensor;
  close(): void;
}

interface FileAddon {
  PageFile: new (stream: NativeStream, path: string, bytes: number, slotBytes: number) => NativePageFile;
  SafetensorsFile: new (path: string) => NativeSafetensorsFile;
  writeFile(path: string, temporaryPath: string, parts: readonly (NativeTensor | ArrayBufferView)[]): Promise<void>;
}

export const nativeFile = native as unknown as FileAddon;
