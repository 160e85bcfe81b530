/** What a trainer tells the recorder of its run. */
import { IGNORED } from '../data/encode.js';
import { preflightFacts } from '../data/preflight.js';
import type { DatasetSource } from '../data/read-rows.js';
import type { RowStore } from '../data/row-store.js';
import type { RunContext, RunSample } from '../report/run-log.js';
import { isMixed, type MixedDataset, type ResolvedTrainerOptions } from './options.js';
import type { Trainee } from './run.js';

export function contextOf({
  stepper,
  model,
  adapter,
  datasets,
}: Pick<Trainee, 'stepper' | 'model' | 'adapter' | 'datasets'>): RunContext {
  const { directory } = model.core;
  const { options, plan, parameters } = stepper;
  const trainableParameters = adapter?.trainableParameters ?? parameters.reduce((n, { size }) => n + size, 0);
  return {
    options: plain({ ...options, model: directory }),
    totalSteps: plan.totalSteps,
    model: { name: directory, device: model.device, sizeBytes: model.sizeBytes, trainableParameters },
    preflight: preflightFacts(datasets.preflight),
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
  { model, adapter, stepper: { step } }: Pick<Trainee, 'stepper' | 'model' | 'adapter'>,
  rows: RowStore,
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
