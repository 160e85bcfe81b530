/** The worker of parquet.ts. */
import { type FileHandle, open } from 'node:fs/promises';
import { parentPort, workerData } from 'node:worker_threads';
import { type FileMetaData, parquetMetadataAsync, parquetRead } from 'hyparquet';
import { compressors } from 'hyparquet-compressors';
import { knownFields } from './rows.js';

export type ParquetRequest = { kind: 'open' } | { kind: 'next' };
export type ParquetAnswer =
  | { kind: 'opened'; rows: number }
  | { kind: 'records'; records: unknown[] }
  | { kind: 'end' }
  | { kind: 'failed'; message: string; code?: string; group?: number };

/** A row group is decoded as a whole. One that is larger than this is a lie, or a file made for other machines. */
const mostRows = 2 ** 24;
const mostBytes = 2 ** 32;
const rowsAnAnswer = 256;

class ParquetFile {
  readonly #file: FileHandle;
  readonly #size: number;
  readonly #metadata: FileMetaData;
  #group = 0;
  #done = 0;
  #rows: unknown[] = [];

  private constructor(file: FileHandle, size: number, metadata: FileMetaData) {
    this.#file = file;
    this.#size = size;
    this.#metadata = metadata;
  }

  static async open(path: string): Promise<ParquetFile> {
    const file = await open(path);
    const { size } = await file.stat();
    const metadata = await parquetMetadataAsync(bufferOf(file, size));
    const total = metadata.row_groups.reduce((sum, { num_rows }) => sum + num_rows, 0n);
    if (total !== metadata.num_rows) throw new Error(`it says ${metadata.num_rows} rows, and its groups have ${total}`);
    return new ParquetFile(file, size, metadata);
  }

  get rows(): number {
    return Number(this.#metadata.num_rows);
  }

  get group(): number {
    return this.#group;
  }

  async next(): Promise<unknown[]> {
    while (this.#rows.length === 0) {
      const group = this.#metadata.row_groups[this.#group];
      if (!group) return [];
      const count = Number(group.num_rows);
      if (count > mostRows || group.total_byte_size > mostBytes) {
        throw new Error(`a row group of ${count} rows and ${group.total_byte_size} bytes is too large`);
      }
      if (count > 0) this.#rows = await this.#read(this.#done, this.#done + count);
      this.#done += count;
      this.#group++;
    }
    return this.#rows.splice(0, rowsAnAnswer);
  }

  async #read(rowStart: number, rowEnd: number): Promise<unknown[]> {
    const names = (this.#metadata.schema[0]?.num_children ?? 0) > 0 ? topNames(this.#metadata) : [];
    const wanted = names.filter((name) => knownFields.has(name));
    const columns = wanted.length > 0 ? wanted : names;
    let records: unknown[] = [];
    await parquetRead({
      file: bufferOf(this.#file, this.#size),
      metadata: this.#metadata,
      columns,
      rowStart,
      rowEnd,
      compressors,
      rowFormat: 'array',
      onComplete: (rows: unknown[][]) => {
        records = rows.map((row) => Object.fromEntries(columns.map((name, i) => [name, plain(row[i])])));
      },
    });
    if (records.length !== rowEnd - rowStart) {
      throw new Error(`it holds ${records.length} rows where it says ${rowEnd - rowStart}`);
    }
    return records;
  }
}

/** Names of the columns, in hyparquet's order. */
function topNames({ schema }: FileMetaData): string[] {
  const names: string[] = [];
  const skip = (at: number): number => {
    let next = at + 1;
    for (let i = 0; i < (schema[at]?.num_children ?? 0); i++) next = skip(next);
    return next;
  };
  for (let at = 1; at < schema.length; at = skip(at)) names.push((schema[at] as { name: string }).name);
  return names;
}

function bufferOf(file: FileHandle, byteLength: number) {
  return {
    byteLength,
    async slice(start: number, end = byteLength): Promise<ArrayBuffer> {
      if (!(start >= 0 && end >= start && end <= byteLength)) {
        throw new Error(`it points to bytes ${start} to ${end}, and has ${byteLength}`);
      }
      const bytes = new Uint8Array(end - start);
      let length = 0;
      while (length < bytes.length) {
        const { bytesRead } = await file.read(bytes, length, bytes.length - length, start + length);
        if (bytesRead === 0) throw new Error('it was cut short while it was read');
        length += bytesRead;
      }
      return bytes.buffer;
    },
  };
}

/** 64-bit numbers as JavaScript's, typed arrays as arrays: what JSON would have given. */
function plain(value: unknown): unknown {
  if (typeof value === 'bigint') return Number(value);
  if (typeof value !== 'object' || value === null || value instanceof Date) return value;
  if (ArrayBuffer.isView(value) && !(value instanceof DataView)) return Array.from(value as never, plain);
  if (Array.isArray(value)) return value.map(plain);
  return Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, plain(inner)]));
}

let file: ParquetFile | undefined;

async function answer({ kind }: ParquetRequest): Promise<ParquetAnswer> {
  try {
    file ??= await ParquetFile.open((workerData as { path: string }).path);
    if (kind === 'open') return { kind: 'opened', rows: file.rows };
    const records = await file.next();
    return records.length > 0 ? { kind: 'records', records } : { kind: 'end' };
  } catch (error) {
    const { message, code, syscall } = error as NodeJS.ErrnoException;
    return { kind: 'failed', message, code: syscall === undefined ? undefined : code, group: file?.group };
  }
}

parentPort?.on('message', async (request: ParquetRequest) => parentPort?.postMessage(await answer(request)));
