/** A run before its model is loaded: its rows, its steps, and the memory that it takes. */
import { givingWay } from '../data/give-way.js';
import type { RowStore } from '../data/row-store.js';
import { templateOf } from '../data/templates.js';
import { bytes } from '../format.js';
import { locate } from '../io/hub.js';
import { readTrainingRecord } from '../io/training-record.js';
import { log } from '../logger.js';
import { QuantizedModel } from '../quantized-model.js';
import { type Datasets, prepareDatasets } from './dataset.js';
import { refuseAbove } from './memory-advice.js';
import { chooseMemory, type MemoryChoice } from './memory-plan.js';
import { evalBatches, microBatches } from './micro-step.js';
import { deviceOf, type ResolvedTrainerOptions } from './options.js';
import type { Heaviest } from './rehearsal.js';
import { StepPlan } from './step-plan.js';

/** What is known of a run before its model is loaded. */
export interface PlannedRun extends MemoryChoice {
  datasets: Datasets;
  steps: StepPlan;
}

/** Whether a run cannot begin without a plan: a device has no memory but its own. */
export function needsPlan(options: ResolvedTrainerOptions): boolean {
  return options.maxMemory !== undefined || options.gradientCheckpointing === 'auto' || deviceOf(options) !== 'cpu';
}

/**
 * Reads and encodes the data, and plans memory. Of the model only its configuration, its tokenizer and the headers of
 * its files are read.
 *
 * @param demand 'fit' makes a plan above its budget an error
 * @throws ERR_QLORA_MEMORY_PLAN, with changes that would fit
 */
export async function planRun(options: ResolvedTrainerOptions, demand: 'fit' | 'any'): Promise<PlannedRun> {
  const { model: given, quantization, computeDtype, device, offline, revision, lora } = options;
  const load = { quantization, computeDtype, device, offline, revision };
  const model =
    typeof given === 'string'
      ? await QuantizedModel.loadWith(given, load, lora === 'none' ? 'masters' : 'as-in-file', 'rehearsal')
      : given;
  try {
    const { core } = model;
    const { peakBytes, byClass } = core.stream.memory();
    const outside =
      typeof given === 'string' ? { loading: peakBytes, others: 0 } : { loading: 0, others: byClass.adapters ?? 0 };
    const initialAdapter = options.initialAdapter && (await locate(options.initialAdapter, 'adapter', { offline }));
    // What an adapter, or a model that one was merged into, was trained with it goes on with.
    options.template ??= templateOf(initialAdapter ? await readTrainingRecord(initialAdapter) : core.training);
    const datasets = await prepareDatasets(core, options);
    try {
      const steps = await StepPlan.create(datasets.train, options);
      const heaviest = await heaviestOf(steps, datasets.eval, options);
      const run = { core, options: { ...options, initialAdapter }, outside, steps, heaviest };
      const choice = await chooseMemory(run);
      const { memory, checkpointedLayers, paging } = choice;
      if (demand === 'fit') await refuseAbove(run, memory);
      log('info', `memory is planned: ${bytes(memory.total)}`, { ...memory, checkpointedLayers, ...paging });
      return { datasets, steps, ...choice };
    } catch (error) {
      await datasets.close();
      throw error;
    }
  } finally {
    if (typeof given === 'string') await model.dispose();
  }
}

/** Of the micro-batches that came the ones that may take most memory. */
class Heavy {
  readonly #best: { batch: number[]; measures: [number, number] }[] = [];

  constructor(
    private readonly tokens: (i: number) => number,
    private readonly targets: (i: number) => number,
  ) {}

  /** By tokens with padding, by length, and by targets; among equals, by the second measure. */
  consider(batch: number[]): void {
    const length = Math.max(...batch.map(this.tokens));
    const area = length * batch.length;
    const targets = batch.reduce((n, i) => n + this.targets(i), 0);
    const orders: [number, number][] = [
      [area, targets],
      [length, area],
      [targets, area],
    ];
    orders.forEach((measures, k) => {
      const [first, second] = this.#best[k]?.measures ?? [-1, -1];
      if (measures[0] > first || (measures[0] === first && measures[1] > second)) this.#best[k] = { batch, measures };
    });
  }

  get batches(): number[][] {
    return [...new Set(this.#best.map(({ batch }) => batch))];
  }
}

async function heaviestOf(
  steps: StepPlan,
  evalRows: RowStore | undefined,
  { batchSize }: ResolvedTrainerOptions,
): Promise<Heaviest> {
  const { tokens, targets } = steps.sequences;
  const giveWay = givingWay();
  const trained = new Heavy(
    (i) => tokens[i] as number,
    (i) => targets[i] as number,
  );
  for (let step = 0; step < steps.totalSteps; step++) {
    const ofStep = [...(await steps.sequencesOf(step))];
    for (const batch of microBatches(ofStep, (i) => tokens[i] as number, batchSize)) trained.consider(batch);
    await giveWay();
  }
  const train = await Promise.all(trained.batches.map((batch) => steps.load(batch)));
  if (!evalRows) return { train, eval: [] };
  const evaluated = new Heavy(
    (i) => evalRows.tokens(i),
    (i) => evalRows.targets(i),
  );
  for (const batch of evalBatches(evalRows, batchSize)) evaluated.consider(batch);
  const rows = await Promise.all(evaluated.batches.map((batch) => evalRows.rows(batch)));
  return { train, eval: rows.map((batch) => batch.map((row) => [row])) };
}
