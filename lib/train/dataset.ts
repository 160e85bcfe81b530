/** From sources of rows to encoded rows by number. */
import { type EncodedRow, type EncodeOptions, encodeRow, IGNORED } from '../data/encode.js';
import { type EncodedSource, encodeSource } from '../data/encode-source.js';
import { givingWay } from '../data/give-way.js';
import { mixRows } from '../data/mixture.js';
import { splitRows } from '../data/order.js';
import { logPreflight, type Preflight, preflight, splitSentence, usingRows } from '../data/preflight.js';
import type { DatasetSource } from '../data/read-rows.js';
import { ConcatenatedRows, type RowStore, SelectedRows } from '../data/row-store.js';
import { type Row, type RowPlace, toRow } from '../data/rows.js';
import { QLoRAError } from '../errors.js';
import { log } from '../logger.js';
import { checkIds, type ModelCore } from '../models/core.js';
import { isMixed, type MixedDataset, type ResolvedTrainerOptions } from './options.js';

export function encodeOptionsOf(options: ResolvedTrainerOptions): EncodeOptions {
  const { template, sourceMaxLength, targetMaxLength, maxLength, trainOnSource, maskHistory } = options;
  return { template, sourceMaxLength, targetMaxLength, maxLength, trainOnSource, maskHistory };
}

function checkRow(core: ModelCore, ids: ArrayLike<number>, labels: ArrayLike<number>, { row }: RowPlace): void {
  checkIds(ids, core.config.vocabSize, `row ${row}: inputIds`);
  checkIds(labels, core.config.vocabSize, `row ${row}: labels`);
}

/** A few rows from the program, in memory. */
export async function encodeRows(
  core: ModelCore,
  rows: readonly Row[],
  encoding: EncodeOptions,
): Promise<EncodedRow[]> {
  const encoded: EncodedRow[] = [];
  const giveWay = givingWay();
  for (const [i, row] of rows.entries()) {
    const place = { row: i + 1 };
    const one = encodeRow(toRow(row, place), core.tokenizer, encoding, place);
    checkRow(
      core,
      one.ids,
      one.labels.filter((label) => label !== IGNORED),
      place,
    );
    encoded.push(one);
    await giveWay();
  }
  if (encoded.length === 0) throw empty();
  return encoded;
}

type Part = EncodedSource & { weight: number };

/** The parts of a data set, encoded. Whoever asked closes their rows. */
async function encodeParts(
  core: ModelCore,
  dataset: DatasetSource | MixedDataset[],
  encoding: EncodeOptions,
  format: string | undefined,
  maxSamples = Number.POSITIVE_INFINITY,
): Promise<Part[]> {
  const parts: Part[] = [];
  let left = maxSamples;
  try {
    for (const part of isMixed(dataset) ? dataset : [{ source: dataset } as MixedDataset]) {
      const limit = Math.min(part.maxSamples ?? Number.POSITIVE_INFINITY, left);
      if (limit <= 0) continue;
      const encoded = await encodeSource(part.source, core.tokenizer, {
        encoding,
        format: part.format ?? format,
        limit: Number.isFinite(limit) ? limit : undefined,
        vocabSize: core.config.vocabSize,
        check: (ids, labels, place) => checkRow(core, ids, labels, place),
      });
      parts.push({ ...encoded, weight: part.weight ?? 1 });
      const { name, total } = encoded;
      left -= encoded.rows.count;
      log('info', usingRows({ name, used: encoded.rows.count, total }), {
        source: name,
        used: encoded.rows.count,
        total,
      });
    }
    if (parts.every(({ rows }) => rows.count === 0)) throw empty(parts.map(({ name }) => name));
    return parts;
  } catch (error) {
    await closeParts(parts);
    throw error;
  }
}

async function closeParts(parts: readonly Part[]): Promise<void> {
  for (const { rows } of parts) await rows.close();
}

function empty(names: readonly string[] = []): QLoRAError {
  const of = names.length === 0 ? '' : ` of ${names.join(', ')}`;
  return new QLoRAError('ERR_QLORA_DATASET_EMPTY', `the data set${of} has no rows, at least one is needed`, {
    hint: 'Check its path and content; the header of a table is no row.',
  });
}

function concatenated(parts: readonly Part[]): RowStore {
  const [only] = parts;
  return parts.length === 1 && only ? only.rows : new ConcatenatedRows(parts.map(({ rows }) => rows));
}

/** Rows that are looked at once, and then disposed of. */
export interface OpenRows extends AsyncDisposable {
  rows: RowStore;
}

export async function encodeDataset(
  core: ModelCore,
  dataset: DatasetSource,
  encoding: EncodeOptions,
  format: string | undefined,
): Promise<OpenRows> {
  const parts = await encodeParts(core, dataset, encoding, format);
  return { rows: concatenated(parts), [Symbol.asyncDispose]: () => closeParts(parts) };
}

export interface Datasets {
  train: RowStore;
  eval: RowStore | undefined;
  /** Of the data set, before rows are split off. */
  preflight: Preflight;
  /** Frees the files of rows that are not in memory. */
  close(): Promise<void>;
}

export async function prepareDatasets(core: ModelCore, options: ResolvedTrainerOptions): Promise<Datasets> {
  const { dataset, evalDataset, datasetFormat, maxTrainSamples, maxEvalSamples, seed } = options;
  const encoding = encodeOptionsOf(options);
  const splits = typeof evalDataset === 'number';
  const parts = await encodeParts(core, dataset, encoding, datasetFormat, splits ? undefined : maxTrainSamples);
  let evalParts: Part[] = [];
  try {
    if (evalDataset !== undefined && !splits) {
      evalParts = await encodeParts(core, evalDataset, encoding, datasetFormat, maxEvalSamples);
    }
    const report = await preflight(parts);
    logPreflight(report);
    const all = concatenated(parts);
    const split = splits ? splitRows(all.count, evalDataset, seed) : undefined;
    const numbers = split?.train.slice(0, maxTrainSamples) ?? Uint32Array.from({ length: all.count }, (_, i) => i);
    if (split) {
      const evalRows = Math.min(split.eval.length, maxEvalSamples ?? Number.POSITIVE_INFINITY);
      report.split = { train: numbers.length, eval: evalRows };
      log('info', splitSentence(report.split), report.split);
    }
    const mixed = mixRows(numbers, rangesOf(parts), seed);
    return {
      train: mixed.length === all.count && !split ? all : new SelectedRows(all, mixed),
      eval: split
        ? new SelectedRows(all, split.eval.slice(0, maxEvalSamples))
        : evalParts.length > 0
          ? concatenated(evalParts)
          : undefined,
      preflight: report,
      close: () => closeParts([...parts, ...evalParts]),
    };
  } catch (error) {
    await closeParts([...parts, ...evalParts]);
    throw error;
  }
}

function rangesOf(parts: readonly Part[]): { start: number; end: number; weight: number }[] {
  let end = 0;
  return parts.map(({ rows, weight }) => {
    end += rows.count;
    return { start: end - rows.count, end, weight };
  });
}
