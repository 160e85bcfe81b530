import { createReadStream } from 'node:fs';
import { readdir, readFile, stat } from 'node:fs/promises';
import { basename, extname, join } from 'node:path';
import { QLoRAError } from '../errors.js';
import { checkFormat, type LocatedRow, type Row, toRow } from './rows.js';

/** A file, a folder, or rows. */
export type DatasetSource = string | Iterable<Row> | AsyncIterable<Row>;

export interface ReadOptions {
  /** A name of behaviour.md's table; left out, each row's own fields tell. */
  format?: string;
}

interface Located {
  record: unknown;
  file: string;
  line?: number;
}

/** Readers by extension: one entry a file format. */
const READERS: Readonly<Record<string, (path: string) => AsyncIterable<Located>>> = {
  '.json': readJson,
  '.jsonl': readLines,
  '.ndjson': readLines,
};
/** What Hugging Face and others put beside the data. */
const NOT_DATA = new Set([
  'dataset_info.json',
  'dataset_infos.json',
  'dataset_dict.json',
  'state.json',
  'package.json',
]);
/** A line longer than this is a file that is no JSONL. */
const MAX_LINE_BYTES = 2 ** 28;

/**
 * The rows of a source, one after the other, each with where it stands. A JSONL file is streamed; a JSON file holds an
 * array or an object with the array in `data`; of a folder all data files are read, by name.
 * Throws ERR_QLORA_DATASET_NOT_FOUND, ERR_QLORA_DATASET_FORMAT, ERR_QLORA_DATASET_INVALID (what is in a file is no
 * JSON: with the line), ERR_QLORA_ROW_INVALID.
 */
export async function* readRows(source: DatasetSource, { format }: ReadOptions = {}): AsyncGenerator<LocatedRow> {
  checkFormat(format);
  let row = 0;
  if (typeof source === 'string') {
    for await (const { record, file, line } of readPath(source)) {
      const place = { row: ++row, file, line };
      yield { row: toRow(record, place, format), place };
    }
    return;
  }
  if (!isIterable(source)) {
    throw new QLoRAError(
      'ERR_QLORA_DATASET_FORMAT',
      `A data set is a path or rows, not ${source === null ? 'null' : typeof source}`,
      {
        hint: 'Pass the path of a file or folder, an array of rows, or an iterable.',
      },
    );
  }
  for await (const record of source) {
    const place = { row: ++row };
    yield { row: toRow(record, place, format), place };
  }
}

function isIterable(source: unknown): source is Iterable<Row> | AsyncIterable<Row> {
  if (typeof source !== 'object' || source === null) return false;
  return Symbol.iterator in source || Symbol.asyncIterator in source;
}

async function* readPath(path: string): AsyncGenerator<Located> {
  const info = await stat(path).catch((error: NodeJS.ErrnoException) => {
    throw unreadable(path, error);
  });
  if (!info.isDirectory()) {
    yield* readerOf(path)(path);
    return;
  }
  const names = (await readdir(path)).filter((name) => !name.startsWith('.')).sort();
  const data = names.filter((name) => Object.hasOwn(READERS, extension(name)) && !NOT_DATA.has(name));
  if (data.length === 0) {
    const found = names.slice(0, 10).join(', ') || 'nothing';
    throw wrongFormat(`The folder ${path} holds no data file: expected ${supported()}, found ${found}`, path);
  }
  for (const name of data) yield* readerOf(name)(join(path, name));
}

function extension(path: string): string {
  return extname(path).toLowerCase();
}

function supported(): string {
  return Object.keys(READERS).join(', ');
}

function readerOf(path: string): (path: string) => AsyncIterable<Located> {
  const end = extension(path);
  const reader = Object.hasOwn(READERS, end) ? READERS[end] : undefined;
  if (reader) return reader;
  throw wrongFormat(
    `${path} ends in '${end || basename(path)}'; data files that can be read end in ${supported()}`,
    path,
  );
}

async function* readJson(path: string): AsyncGenerator<Located> {
  const text = await readFile(path, 'utf8').catch((error: NodeJS.ErrnoException) => {
    throw unreadable(path, error);
  });
  let value: unknown;
  try {
    value = JSON.parse(text.replace(/^\ufeff/, ''));
  } catch (error) {
    // Many files named .json hold one object a line.
    if (isObjectLine(text)) {
      yield* readLines(path);
      return;
    }
    throw broken(path, undefined, error as Error);
  }
  const rows = Array.isArray(value) ? value : (value as { data?: unknown } | null)?.data;
  if (!Array.isArray(rows)) {
    throw wrongFormat(`${path} must hold an array of rows, or an object whose 'data' is one`, path);
  }
  for (const record of rows as unknown[]) yield { record, file: path };
}

function isObjectLine(text: string): boolean {
  const start = text.search(/[^\s\ufeff]/);
  const end = text.indexOf('\n', start);
  if (start < 0 || end < 0 || text[start] !== '{') return false;
  try {
    JSON.parse(text.slice(start, end));
    return true;
  } catch {
    return false;
  }
}

async function* readLines(path: string): AsyncGenerator<Located> {
  let number = 0;
  for await (const bytes of splitLines(path)) {
    number++;
    const text = bytes.toString('utf8');
    const line = (number === 1 ? text.replace(/^\ufeff/, '') : text).trim();
    if (line === '') continue;
    let record: unknown;
    try {
      record = JSON.parse(line);
    } catch (error) {
      throw broken(path, number, error as Error);
    }
    yield { record, file: path, line: number };
  }
}

/** Lines end at \n only: JSON strings may hold every other line separator, which node:readline splits at. */
async function* splitLines(path: string): AsyncGenerator<Buffer> {
  let parts: Buffer[] = [];
  let length = 0;
  const stream = createReadStream(path, { highWaterMark: 2 ** 18 });
  try {
    for await (const chunk of stream as AsyncIterable<Buffer>) {
      let start = 0;
      for (let end = chunk.indexOf(10); end >= 0; end = chunk.indexOf(10, start)) {
        yield Buffer.concat([...parts, chunk.subarray(start, end)]);
        parts = [];
        length = 0;
        start = end + 1;
      }
      const rest = chunk.subarray(start);
      length += rest.length;
      if (length > MAX_LINE_BYTES) throw wrongFormat(`${path} has a line longer than ${MAX_LINE_BYTES} bytes`, path);
      if (rest.length > 0) parts.push(rest);
    }
  } catch (error) {
    throw error instanceof QLoRAError ? error : unreadable(path, error as NodeJS.ErrnoException);
  }
  if (parts.length > 0) yield Buffer.concat(parts);
}

function unreadable(path: string, error: NodeJS.ErrnoException): QLoRAError {
  const gone = error.code === 'ENOENT' || error.code === 'ENOTDIR';
  const what = gone ? `There is no data set at ${path}` : `The data set at ${path} cannot be read: ${error.message}`;
  return new QLoRAError(gone ? 'ERR_QLORA_DATASET_NOT_FOUND' : 'ERR_QLORA_IO', what, {
    hint: 'Check the path; a relative one starts at the working directory of the process.',
    detail: { path },
    cause: error,
  });
}

function wrongFormat(message: string, path: string): QLoRAError {
  return new QLoRAError('ERR_QLORA_DATASET_FORMAT', message, {
    hint: 'Write one JSON object a line into a .jsonl file, or pass rows from your program.',
    detail: { path, supported: Object.keys(READERS) },
  });
}

function broken(path: string, line: number | undefined, error: Error): QLoRAError {
  const where = line === undefined ? path : `line ${line} of ${path}`;
  return new QLoRAError('ERR_QLORA_DATASET_INVALID', `What is in ${where} is not JSON: ${error.message}`, {
    hint: line === undefined ? 'A .json file holds one array of objects.' : 'A .jsonl file holds one object a line.',
    detail: { path, line },
    cause: error,
  });
}
