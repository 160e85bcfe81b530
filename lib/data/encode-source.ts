/** From a source of rows to encoded rows: from the cache, or tokenized once. */
import { log } from '../logger.js';
import type { Tokenizer } from '../tokenizer/tokenizer.js';
import { cacheFolder, cacheKey, openCached, spillFolder, writeCached } from './cache.js';
import { dataFiles } from './data-files.js';
import { type EncodeOptions, IGNORED, noTargets } from './encode.js';
import { EncodePool } from './encode-pool.js';
import { ChunkBuilder, column, columns, type EncodedChunk, unpackRow, wordsOf } from './encoded-chunk.js';
import { type EncodedRows, RowSink } from './encoded-rows.js';
import { givingWay } from './give-way.js';
import { type DatasetSource, nameOf, type ReadReport, readRows } from './read-rows.js';
import { describePlace, type LocatedRow, type Row, type RowPlace } from './rows.js';

export interface SourceOptions {
  encoding: EncodeOptions;
  format?: string;
  /** At most so many rows, the first ones. Default: all. */
  limit?: number;
  /** Checks each row's ids and the labels among them; what it throws ends the encoding. */
  check(ids: Int32Array, labels: Int32Array, place: RowPlace): void;
  /** Of which the cached rows depend beside all else, such as the size of the model's vocabulary. */
  vocabSize: number;
  /** Rows of more bytes than this are held in a file. Default 64 MiB. */
  memoryBytes?: number;
  /** Characters of text beyond which threads of their own encode. Default 1 Mi. */
  threadsFrom?: number;
}

export interface EncodedSource {
  name: string;
  rows: EncodedRows;
  /** Rows that the source has; undefined where it went on beyond the limit. */
  total: number | undefined;
}

/** A chunk goes to a worker when it has so many characters. */
const chunkSize = 2 ** 16;
/** Of rows with nothing to train so many are named. */
const mostNamed = 10;

/**
 * Encodes every row of a source, or finds it encoded in the cache, where rows of files are kept.
 *
 * @throws what readRows and encodeRow throw; ERR_QLORA_NO_TARGETS names all rows with nothing to train, up to 10
 */
export async function encodeSource(
  source: DatasetSource,
  tokenizer: Tokenizer | undefined,
  options: SourceOptions,
): Promise<EncodedSource> {
  const { encoding, format, limit, vocabSize, memoryBytes = 2 ** 26 } = options;
  const name = nameOf(source);
  const folder = typeof source === 'string' ? cacheFolder() : undefined;
  let key: string | undefined;
  if (folder !== undefined) {
    const { files } = await dataFiles(source as string);
    const { directory } = tokenizer ?? {};
    key = await cacheKey(files, directory, { encoding, format, limit, vocabSize, names: files.map(endOf) });
    const cached = await openCached(folder, key, memoryBytes);
    if (cached) {
      log('info', `rows of ${name} come from the cache in ${folder}`, { key });
      return { name, ...cached };
    }
  }
  const sink = new RowSink({ folder: await spillFolder(), memoryBytes });
  const report: ReadReport = {};
  try {
    await fill(sink, readRows(source, { format, limit, report }), tokenizer, options);
    if (folder !== undefined && key !== undefined && sink.rows > 0) {
      await writeCached(folder, key, sink, report.total as number);
    }
    return { name, rows: await sink.finish(), total: report.total };
  } catch (error) {
    await sink.discard();
    throw error;
  }
}

/** The end of a file's name says how it is read. */
function endOf(file: string): string {
  return /(\.[^./\\]*){0,2}$/.exec(file)?.[0] ?? '';
}

async function fill(
  sink: RowSink,
  rows: AsyncIterable<LocatedRow>,
  tokenizer: Tokenizer | undefined,
  options: SourceOptions,
): Promise<void> {
  const { encoding, check, threadsFrom = 2 ** 20 } = options;
  const untrained: { place: RowPlace; why: string }[] = [];
  let untrainedCount = 0;
  const take = async (chunk: EncodedChunk, from: readonly LocatedRow[]): Promise<void> => {
    await checkChunk(chunk, from, check);
    for (const { row, why } of chunk.untrained) {
      if (untrainedCount++ < mostNamed) untrained.push({ place: (from[row] as LocatedRow).place, why });
    }
    await sink.add(chunk);
  };

  let pool: EncodePool | undefined;
  const waiting: { rows: LocatedRow[]; chunk: Promise<EncodedChunk> }[] = [];
  const next = async (): Promise<void> => {
    const { rows: from, chunk } = waiting.shift() as (typeof waiting)[number];
    await take(await chunk, from);
  };
  const give = async (batch: LocatedRow[], size: number): Promise<void> => {
    seen += size;
    if (tokenizer && seen > threadsFrom) pool ??= new EncodePool({ directory: tokenizer.directory, options: encoding });
    if (!pool) return take(await encodeInSlices(batch, tokenizer, encoding), batch);
    const chunk = pool.encode(batch);
    chunk.catch(() => {});
    waiting.push({ rows: batch, chunk });
    if (waiting.length >= pool.depth) await next();
  };
  let seen = 0;
  try {
    let batch: LocatedRow[] = [];
    let size = 0;
    for await (const row of rows) {
      batch.push(row);
      size += sizeOf(row.row);
      if (size < chunkSize) continue;
      await give(batch, size);
      batch = [];
      size = 0;
    }
    if (batch.length > 0) await give(batch, size);
    while (waiting.length > 0) await next();
  } finally {
    await pool?.close();
  }
  if (untrainedCount > 0) throw untrainedRows(untrained, untrainedCount);
}

async function encodeInSlices(
  rows: readonly LocatedRow[],
  tokenizer: Tokenizer | undefined,
  encoding: EncodeOptions,
): Promise<EncodedChunk> {
  const builder = new ChunkBuilder();
  const giveWay = givingWay();
  for (const row of rows) {
    builder.add(row, tokenizer, encoding);
    await giveWay();
  }
  return builder.take();
}

async function checkChunk(
  { words, index }: EncodedChunk,
  rows: readonly LocatedRow[],
  check: SourceOptions['check'],
): Promise<void> {
  let at = 0;
  const giveWay = givingWay();
  for (const [i, { place }] of rows.entries()) {
    const entry = index.subarray(i * columns, (i + 1) * columns);
    const length = wordsOf(entry[column.tokens] as number, entry[column.flags] as number);
    const { ids, labels } = unpackRow(words.subarray(at, at + length), entry);
    check(
      ids,
      labels.filter((label) => label !== IGNORED),
      place,
    );
    at += length;
    await giveWay();
  }
}

/** About how many characters are to be encoded. */
function sizeOf(row: Row): number {
  if ('inputIds' in row) return row.inputIds.length;
  if ('text' in row) return row.text.length;
  if ('prompt' in row) return row.prompt.length + row.completion.length;
  if ('instruction' in row) return row.instruction.length + (row.input?.length ?? 0) + row.output.length;
  return row.messages.reduce((n, { content }) => n + content.length + 16, 0);
}

function untrainedRows(named: readonly { place: RowPlace; why: string }[], count: number): Error {
  const [first] = named as [(typeof named)[number]];
  if (count === 1)
    return noTargets(describePlace(first.place), first.why, { ...first.place, rows: [first.place.row], count });
  const list = named.map(({ place }) => describePlace(place)).join(', ');
  const more = count > named.length ? `, and ${count - named.length} more` : '';
  const rows = named.map(({ place }) => place.row);
  return noTargets(`${count} rows (${list}${more})`, first.why, { ...first.place, rows, count });
}
