/** What a trainer tells the recorder of its run. */
import { IGNORED } from '../data/encode.js';
import type { DatasetSource } from '../data/read-rows.js';
import type { RowStore } from '../data/row-store.js';
import type { LoraAdapter } from '../models/lora-adapter.js';
import type { QuantizedModel } from '../quantized-model.js';
import type { RunContext, RunSample } from '../report/run-log.js';
import { isMixed, type MixedDataset, type ResolvedTrainerOptions } from './options.js';

export interface Recorded {
  model: QuantizedModel;
  adapter: LoraAdapter | undefined;
  options: ResolvedTrainerOptions;
  totalSteps: number;
}

export function contextOf({ model, adapter, options, totalSteps }: Recorded): RunContext {
  const { core, device, sizeBytes } = model;
  const all = [...core.weights.dense.values()].reduce((n, { size }) => n + size, 0);
  return {
    options: plain({ ...options, model: core.directory }),
    totalSteps,
    model: { name: core.directory, device, sizeBytes, trainableParameters: adapter?.trainableParameters ?? all },
  };
}

/** Options as JSON: what was given by the program is named, not copied. */
function plain({ dataset, evalDataset, lora, ...rest }: ResolvedTrainerOptions): Record<string, unknown> {
  const parts = isMixed(dataset)
    ? dataset.map((part: MixedDataset) => ({ ...part, source: sourceName(part.source) }))
    : sourceName(dataset);
  const evals = typeof evalDataset === 'object' ? sourceName(evalDataset) : evalDataset;
  const asText = (_: string, value: unknown) => (value instanceof RegExp ? String(value) : value);
  return JSON.parse(JSON.stringify({ ...rest, dataset: parts, evalDataset: evals, lora }, asText));
}

function sourceName(source: DatasetSource): string {
  if (typeof source === 'string') return source;
  return Array.isArray(source) ? `${source.length} rows of the program` : 'rows of the program';
}

/** Rows that are asked after an evaluation, and tokens of an answer. */
const asked = 3;
const maxNewTokens = 64;

/**
 * What the model answers, greedily, to the first eval rows that have a prompt. None without a tokenizer, and none for
 * rows of which everything is trained.
 */
export async function* answers(
  { model, adapter }: Pick<Recorded, 'model' | 'adapter'>,
  rows: RowStore,
  step: number,
  signal: AbortSignal,
): AsyncGenerator<RunSample> {
  const { tokenizer } = model.core;
  if (!tokenizer) return;
  const text = (ids: ArrayLike<number>) => tokenizer.decode(ids, { skipSpecialTokens: true }).trim();
  const first = Array.from({ length: Math.min(asked, rows.count) }, (_, i) => i);
  for (const { ids, labels } of await rows.rows(first)) {
    const begin = labels.findIndex((label) => label !== IGNORED);
    const end = labels.indexOf(IGNORED, begin);
    const prompt = text(ids.subarray(0, begin));
    if (prompt === '') continue;
    const options = { adapter: adapter?.name ?? null, doSample: false, maxNewTokens, signal };
    const answer = await model.generateTokens(ids.subarray(0, begin), options);
    const expected = text(ids.subarray(begin, end < 0 ? ids.length : end));
    yield { step, prompt, expected, text: text(answer) };
  }
}
