import { QLoRAError } from '../errors.js';
import { log } from '../logger.js';
import { dataFiles } from './data-files.js';
import { type RawRecord, readerOf } from './readers.js';
import { checkFormat, formatOf, type LocatedRow, type Row } from './rows.js';

/** A file, a folder, or rows. */
export type DatasetSource = string | Iterable<Row> | AsyncIterable<Row>;

export interface ReadOptions {
  /** A name of behaviour.md's table; left out, each row's own fields tell. */
  format?: string;
  /** At most so many rows, the first ones. Default: all. */
  limit?: number;
  /** What is learnt on the way is written into it. */
  report?: ReadReport;
}

export interface ReadReport {
  /** Rows that the source has, used or not; undefined where rows from a program went on beyond the limit. */
  total?: number;
}

/** How a source is called in messages. */
export function nameOf(source: DatasetSource): string {
  return typeof source === 'string' ? source : 'the program';
}

/**
 * The rows of a source, one after the other, each with where it stands. Files are streamed; of a folder the files of
 * its training split are read, by name. The log says which files were chosen, and as which formats rows were read.
 *
 * @throws ERR_QLORA_DATASET_NOT_FOUND, ERR_QLORA_IO, ERR_QLORA_DATASET_FORMAT, ERR_QLORA_DATASET_INVALID (a file is
 *   damaged: with the line), ERR_QLORA_ROW_INVALID
 */
export async function* readRows(source: DatasetSource, options: ReadOptions = {}): AsyncGenerator<LocatedRow> {
  const { format, limit = Number.POSITIVE_INFINITY, report = {} } = options;
  checkFormat(format);
  const announced = new Set<string>();
  const records = typeof source === 'string' ? readPath(source, limit, report) : readGiven(source, limit, report);
  let row = 0;
  for await (const { file, line, parse } of records) {
    const place = { row: ++row, ...(file === undefined ? {} : { file, line }) };
    const record = parse();
    const { name, toRow } = formatOf(record, place, format);
    if (!announced.has(name) && typeof source === 'string') {
      announced.add(name);
      const how = format === undefined ? 'from their fields' : 'as asked';
      log('info', `reading rows of ${source} as '${name}', ${how}`, { format: name, row });
    }
    yield { row: toRow(record, place), place };
  }
}

type Given = Partial<Pick<RawRecord, 'file' | 'line'>> & Pick<RawRecord, 'parse'>;

async function* readPath(path: string, limit: number, report: ReadReport): AsyncGenerator<RawRecord> {
  const { files, notes } = await dataFiles(path);
  for (const note of notes) log('info', note);
  // A file of another kind is an error before any is read.
  const readers = files.map(readerOf);
  let total = 0;
  let used = 0;
  for (const [i, file] of files.entries()) {
    const { records, count } = readers[i] as (typeof readers)[number];
    if (used >= limit && count) {
      total += await count(file);
      continue;
    }
    const before = total;
    for await (const record of records(file)) {
      total++;
      if (used < limit) {
        used++;
        yield record;
      } else if (count) {
        total = before + (await count(file));
        break;
      }
    }
  }
  report.total = total;
}

async function* readGiven(source: unknown, limit: number, report: ReadReport): AsyncGenerator<Given> {
  if (!isIterable(source)) {
    throw new QLoRAError(
      'ERR_QLORA_DATASET_FORMAT',
      `A data set is a path or rows, not ${source === null ? 'null' : typeof source}`,
      {
        hint: 'Pass the path of a file or folder, an array of rows, or an iterable.',
      },
    );
  }
  if (Array.isArray(source)) report.total = source.length;
  let used = 0;
  for await (const record of source) {
    yield { parse: () => record };
    // What comes behind the limit may never end: it is not asked for.
    if (++used >= limit) return;
  }
  report.total = used;
}

function isIterable(source: unknown): source is Iterable<unknown> | AsyncIterable<unknown> {
  if (typeof source !== 'object' || source === null) return false;
  return Symbol.iterator in source || Symbol.asyncIterator in source;
}
