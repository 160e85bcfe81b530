/** Encoded rows of one source: their words in memory or in a file, what is known of each in memory. */
import { randomBytes } from 'node:crypto';
import { type FileHandle, open, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { QLoRAError } from '../errors.js';
import type { EncodedRow } from './encode.js';
import { column, columns, type EncodedChunk, saysNothing, unpackRow, wordsOf } from './encoded-chunk.js';
import type { RowStore } from './row-store.js';

/** Where the words of all rows lie, one row after the other. */
type Words = { memory: Int32Array } | { file: FileHandle };

export class EncodedRows implements RowStore {
  readonly count: number;
  readonly index: Int32Array;
  /** In words, of each row. */
  readonly #offsets: Float64Array;
  readonly #words: Words;

  constructor(index: Int32Array, words: Words) {
    this.index = index;
    this.#words = words;
    this.count = index.length / columns;
    this.#offsets = new Float64Array(this.count);
    let at = 0;
    for (let i = 0; i < this.count; i++) {
      this.#offsets[i] = at;
      at += this.#wordsOf(i);
    }
  }

  get inFile(): boolean {
    return 'file' in this.#words;
  }

  #entry(i: number, name: keyof typeof column): number {
    return this.index[i * columns + column[name]] as number;
  }

  #wordsOf(i: number): number {
    return wordsOf(this.#entry(i, 'tokens'), this.#entry(i, 'flags'));
  }

  tokens(i: number): number {
    return this.#entry(i, 'tokens');
  }

  targets(i: number): number {
    return this.#entry(i, 'targets');
  }

  truncated(i: number): number {
    return this.#entry(i, 'truncated');
  }

  /** Of the row itself, not of its tokens. */
  hash(i: number): [number, number] {
    return [this.#entry(i, 'hashLow'), this.#entry(i, 'hashHigh')];
  }

  saysNothing(i: number): boolean {
    return (this.#entry(i, 'flags') & saysNothing) !== 0;
  }

  rows(indices: ArrayLike<number>): Promise<EncodedRow[]> {
    return Promise.all(Array.from(indices, (i) => this.#row(i)));
  }

  async #row(i: number): Promise<EncodedRow> {
    const begin = this.#offsets[i] as number;
    const length = this.#wordsOf(i);
    const entry = this.index.subarray(i * columns, (i + 1) * columns);
    if ('memory' in this.#words) return unpackRow(this.#words.memory.subarray(begin, begin + length), entry);
    const words = new Int32Array(length);
    await readWhole(this.#words.file, new Uint8Array(words.buffer), begin * 4);
    return unpackRow(words, entry);
  }

  /** Frees the file. */
  async close(): Promise<void> {
    if ('file' in this.#words) await this.#words.file.close();
  }
}

/** Fills `bytes` from a file. @throws ERR_QLORA_READ_FAILED */
export async function readWhole(file: FileHandle, bytes: Uint8Array, position: number): Promise<void> {
  let length = 0;
  while (length < bytes.length) {
    const { bytesRead } = await file.read(bytes, length, bytes.length - length, position + length);
    if (bytesRead === 0) throw new QLoRAError('ERR_QLORA_READ_FAILED', 'a file of encoded rows was cut short');
    length += bytesRead;
  }
}

export interface SinkOptions {
  /** Where a file goes when there is more than memory should hold. */
  folder: string;
  /** Bytes of words that are held in memory. */
  memoryBytes: number;
}

/** Collects encoded rows, first in memory, then in a file. */
export class RowSink {
  readonly #options: SinkOptions;
  #parts: Int32Array[] = [];
  #words = 0;
  #index = new Int32Array(columns * 1024);
  #indexLength = 0;
  #file: { path: string; handle: FileHandle } | undefined;

  constructor(options: SinkOptions) {
    this.#options = options;
  }

  get rows(): number {
    return this.#indexLength / columns;
  }

  get index(): Int32Array {
    return this.#index.subarray(0, this.#indexLength);
  }

  /** In bytes. */
  get size(): number {
    return this.#words * 4;
  }

  /** The file, where there is one: its content so far is the words. */
  get file(): { path: string; handle: FileHandle } | undefined {
    return this.#file;
  }

  get parts(): readonly Int32Array[] {
    return this.#parts;
  }

  async add({ words, index }: EncodedChunk): Promise<void> {
    while (this.#indexLength + index.length > this.#index.length) {
      const larger = new Int32Array(this.#index.length * 2);
      larger.set(this.#index);
      this.#index = larger;
    }
    this.#index.set(index, this.#indexLength);
    this.#indexLength += index.length;
    this.#words += words.length;
    this.#parts.push(words);
    if (this.#file || this.size > this.#options.memoryBytes) await this.#flush();
  }

  async #flush(): Promise<void> {
    try {
      this.#file ??= await temporaryFile(this.#options.folder);
      for (const part of this.#parts) await writeWhole(this.#file.handle, bytesOf(part));
    } catch (error) {
      throw notWritten(this.#options.folder, error as NodeJS.ErrnoException);
    }
    this.#parts = [];
  }

  /** The rows, whose file is gone as soon as it is closed. */
  async finish(): Promise<EncodedRows> {
    const index = this.index.slice();
    if (this.#file) {
      await rm(this.#file.path, { force: true });
      return new EncodedRows(index, { file: this.#file.handle });
    }
    const memory = new Int32Array(this.#words);
    let at = 0;
    for (const part of this.#parts) {
      memory.set(part, at);
      at += part.length;
    }
    return new EncodedRows(index, { memory });
  }

  /** Frees everything after a failure. */
  async discard(): Promise<void> {
    await this.#file?.handle.close();
    if (this.#file) await rm(this.#file.path, { force: true });
  }
}

export function bytesOf(words: Int32Array): Uint8Array {
  return new Uint8Array(words.buffer, words.byteOffset, words.byteLength);
}

/** A name that lib/io/atomic-file.ts knows as one of an unfinished file. */
export async function temporaryFile(folder: string): Promise<{ path: string; handle: FileHandle }> {
  const path = join(folder, `.rows.${randomBytes(8).toString('hex')}.qlora-tmp`);
  return { path, handle: await open(path, 'wx+', 0o600) };
}

export async function writeWhole(file: FileHandle, bytes: Uint8Array): Promise<void> {
  for (let at = 0; at < bytes.length; )
    at += (await file.write(bytes, at, Math.min(bytes.length - at, 2 ** 24))).bytesWritten;
}

function notWritten(folder: string, error: NodeJS.ErrnoException): QLoRAError {
  const full = error.code === 'ENOSPC' || error.code === 'EDQUOT';
  return new QLoRAError(
    full ? 'ERR_QLORA_DISK_FULL' : 'ERR_QLORA_WRITE_FAILED',
    `Encoded rows cannot be written to ${folder}: ${error.message}`,
    { hint: 'Set QLORA_CACHE to a folder with room.', detail: { path: folder }, cause: error },
  );
}
