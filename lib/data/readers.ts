/** Files of rows, by the end of their name. */
import { basename } from 'node:path';
import { readLines, textOf } from './bytes.js';
import { readTable } from './csv.js';
import { damaged, wrongFormat } from './data-errors.js';
import { readJsonElements } from './json-elements.js';
import { countParquet, readParquet } from './parquet.js';

/** A record as it stands in a file; it is parsed only where it is used. */
export interface RawRecord {
  file: string;
  line?: number;
  parse(): unknown;
}

export interface Reader {
  records(path: string): AsyncGenerator<RawRecord>;
  /** Where the number of records is known without going through them. */
  count?(path: string): Promise<number>;
}

const jsonLines: Reader = { records: readJsonLines };
const readers: Readonly<Record<string, Reader>> = {
  '.json': { records: readJson },
  '.jsonl': jsonLines,
  '.ndjson': jsonLines,
  '.csv': { records: (path) => readTable(path, ',') },
  '.tsv': { records: (path) => readTable(path, '\t') },
  '.parquet': { records: readParquet, count: countParquet },
};
/** What is read in whole, so not through a stream that unzips. */
const neverZipped = new Set(['.parquet']);

/** '.json' of a.json and of a.json.gz; undefined for a name that no reader knows. */
export function dataExtension(path: string): string | undefined {
  const name = basename(path).toLowerCase();
  const plain = name.replace(/\.gz$/, '');
  const end = /\.[^.]+$/.exec(plain)?.[0];
  if (end === undefined || !Object.hasOwn(readers, end)) return undefined;
  return plain !== name && neverZipped.has(end) ? undefined : end;
}

export function supportedExtensions(): string {
  return `${Object.keys(readers).join(', ')} (all but .parquet also with .gz)`;
}

export function readerOf(path: string): Reader {
  const end = dataExtension(path);
  if (end !== undefined) return readers[end] as Reader;
  throw wrongFormat(
    `${path} ends in '${/\.[^.]*$/.exec(basename(path))?.[0] ?? basename(path)}'; data files that can be read end in ${supportedExtensions()}`,
    path,
  );
}

async function* readJson(path: string): AsyncGenerator<RawRecord> {
  const elements = readJsonElements(path);
  for (let next = await elements.next(); ; next = await elements.next()) {
    if (next.done) {
      if (next.value === 'lines') yield* readJsonLines(path);
      return;
    }
    const { bytes, line } = next.value;
    yield { file: path, line, parse: () => parseJson(textOf(bytes, path, line), path, line) };
  }
}

async function* readJsonLines(path: string): AsyncGenerator<RawRecord> {
  let number = 0;
  for await (const bytes of readLines(path)) {
    const line = ++number;
    if (isBlank(bytes)) continue;
    yield { file: path, line, parse: () => parseJson(textOf(bytes, path, line), path, line) };
  }
}

function isBlank(bytes: Buffer): boolean {
  return bytes.every((byte) => byte <= 32);
}

function parseJson(text: string, path: string, line: number): unknown {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw damaged(path, line, `it is not JSON: ${(error as Error).message}`, error);
  }
}
