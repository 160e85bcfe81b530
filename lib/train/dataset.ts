/** From a source of rows to encoded rows in memory. */
import { setImmediate } from 'node:timers/promises';
import { type EncodedRow, type EncodeOptions, encodeRow } from '../data/encode.js';
import { splitRows } from '../data/order.js';
import { type DatasetSource, readRows } from '../data/read-rows.js';
import { MemoryRows, type RowStore } from '../data/row-store.js';
import { QLoRAError } from '../errors.js';
import { log } from '../logger.js';
import { checkIds, type ModelCore } from '../models/core.js';
import { isMixed, type MixedDataset, type ResolvedTrainerOptions } from './options.js';

/** Work between two turns of the event loop, in milliseconds. */
const slice = 5;

export function encodeOptionsOf(options: ResolvedTrainerOptions): EncodeOptions {
  const { template, sourceMaxLength, targetMaxLength, maxLength, trainOnSource, maskHistory } = options;
  return { template, sourceMaxLength, targetMaxLength, maxLength, trainOnSource, maskHistory };
}

/** Every row of the source, encoded; ids are checked against the vocabulary. */
export async function encodeDataset(
  core: ModelCore,
  dataset: DatasetSource | MixedDataset[],
  encoding: EncodeOptions,
  format: string | undefined,
  maxSamples = Number.POSITIVE_INFINITY,
): Promise<EncodedRow[]> {
  const parts: MixedDataset[] = isMixed(dataset) ? dataset : [{ source: dataset }];
  const rows: EncodedRow[] = [];
  let turn = performance.now();
  for (const part of parts) {
    let left = Math.min(part.maxSamples ?? Number.POSITIVE_INFINITY, maxSamples - rows.length);
    if (left <= 0) continue;
    const before = rows.length;
    for await (const { row, place } of readRows(part.source, { format: part.format ?? format })) {
      const encoded = encodeRow(row, core.tokenizer, encoding, place);
      checkIds(encoded.ids, core.config.vocabSize, `row ${place.row}: inputIds`);
      checkIds(
        encoded.labels.filter((label) => label !== -100),
        core.config.vocabSize,
        `row ${place.row}: labels`,
      );
      rows.push(encoded);
      if (performance.now() - turn > slice) {
        await setImmediate();
        turn = performance.now();
      }
      if (--left <= 0) break;
    }
    log(
      'info',
      `using ${rows.length - before} rows of ${typeof part.source === 'string' ? part.source : 'the program'}`,
    );
  }
  if (rows.length === 0) {
    throw new QLoRAError('ERR_QLORA_DATASET_EMPTY', 'the data set has no rows, at least one is needed', {
      hint: 'Check its path and content.',
    });
  }
  return rows;
}

export interface Datasets {
  train: RowStore;
  eval: RowStore | undefined;
}

export async function prepareDatasets(core: ModelCore, options: ResolvedTrainerOptions): Promise<Datasets> {
  const { dataset, evalDataset, datasetFormat, maxTrainSamples, maxEvalSamples, seed } = options;
  const encoding = encodeOptionsOf(options);
  if (typeof evalDataset !== 'number') {
    return {
      train: new MemoryRows(await encodeDataset(core, dataset, encoding, datasetFormat, maxTrainSamples)),
      eval: evalDataset
        ? new MemoryRows(await encodeDataset(core, evalDataset, encoding, datasetFormat, maxEvalSamples))
        : undefined,
    };
  }
  const rows = await encodeDataset(core, dataset, encoding, datasetFormat);
  const split = splitRows(rows.length, evalDataset, seed);
  const pick = (indices: Iterable<number>, most?: number) =>
    new MemoryRows(Array.from(indices, (i) => rows[i] as EncodedRow).slice(0, most));
  return { train: pick(split.train, maxTrainSamples), eval: pick(split.eval, maxEvalSamples) };
}
