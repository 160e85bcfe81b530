/** Whether a run fits in memory, how many layers it must compute again so that it does, and what to change if it cannot. */
import { lengthOf, type Sequence } from '../data/batch.js';
import { givingWay } from '../data/give-way.js';
import type { RowStore } from '../data/row-store.js';
import { templateOf } from '../data/templates.js';
import { QLoRAError } from '../errors.js';
import { readTrainingRecord } from '../io/training-record.js';
import { log } from '../logger.js';
import type { ModelCore } from '../models/core.js';
import { QuantizedModel } from '../quantized-model.js';
import { type Datasets, prepareDatasets } from './dataset.js';
import { evalBatches, microBatches } from './micro-step.js';
import type { ResolvedTrainerOptions } from './options.js';
import { type Heaviest, type MemoryPlan, type Outside, rehearse } from './rehearsal.js';
import { packedLength, StepPlan } from './step-plan.js';

/** What is known of a run before its model is loaded. */
export interface PlannedRun {
  datasets: Datasets;
  steps: StepPlan;
  memory: MemoryPlan;
  /** Layers that are computed again in the backward pass. */
  checkpointedLayers: number;
}

/** Whether a run cannot begin without a plan. */
export function needsPlan({ maxMemory, gradientCheckpointing }: ResolvedTrainerOptions): boolean {
  return maxMemory !== undefined || gradientCheckpointing === 'auto';
}

/**
 * Reads and encodes the data, and plans memory. Of the model only its configuration, its tokenizer and the headers of
 * its files are read.
 *
 * @param demand 'fit' makes a plan above maxMemory an error
 * @throws ERR_QLORA_MEMORY_PLAN, with changes that would fit
 */
export async function planRun(options: ResolvedTrainerOptions, demand: 'fit' | 'any'): Promise<PlannedRun> {
  const { model: given, quantization, computeDtype, device, lora, initialAdapter } = options;
  const storage = lora === 'none' ? 'masters' : 'as-in-file';
  const model =
    typeof given === 'string'
      ? await QuantizedModel.loadWith(given, { quantization, computeDtype, device }, storage, 'rehearsal')
      : given;
  try {
    const { core } = model;
    const { peakBytes, byClass } = core.stream.memory();
    const outside =
      typeof given === 'string' ? { loading: peakBytes, others: 0 } : { loading: 0, others: byClass.adapters ?? 0 };
    const record = initialAdapter ? await readTrainingRecord(initialAdapter) : undefined;
    // What an adapter was trained with it goes on with.
    options.template ??= templateOf(record);
    const datasets = await prepareDatasets(core, options);
    try {
      const steps = await StepPlan.create(datasets.train, options);
      const heaviest = await heaviestOf(steps, datasets.eval, options);
      const planned = { core, options, outside, steps, heaviest };
      const chosen = await chooseMemory(planned);
      if (demand === 'fit') await refuseAbove(planned, chosen.memory);
      return { datasets, steps, ...chosen };
    } catch (error) {
      await datasets.close();
      throw error;
    }
  } finally {
    if (typeof given === 'string') await model.dispose();
  }
}

interface Planned {
  core: ModelCore;
  options: ResolvedTrainerOptions;
  outside: Outside;
  steps: StepPlan;
  heaviest: Heaviest;
}

/**
 * The plan of a run. With `gradientCheckpointing: 'auto'` as few layers are computed again as the budget allows: that is
 * maxMemory or, without it, what the system has left for this process.
 */
async function chooseMemory(planned: Planned): Promise<Omit<PlannedRun, 'datasets' | 'steps'>> {
  const { core, options } = planned;
  const layers = core.config.numLayers;
  const planWith = (count: number) => rehearsed(planned, { ...options, gradientCheckpointing: count });
  const { gradientCheckpointing: wanted, maxMemory } = options;
  let most = layers;
  if (wanted === 'auto') {
    const budget = maxMemory ?? process.availableMemory();
    // More layers never take more memory: the fewest that fit are found by halving.
    for (let least = 0; least < most; ) {
      const middle = Math.floor((least + most) / 2);
      if ((await planWith(middle)).total <= budget) most = middle;
      else least = middle + 1;
    }
    log('info', `gradientCheckpointing 'auto': ${most} of ${layers} layers are computed again`, { budget });
  } else if (typeof wanted === 'number') {
    most = wanted;
  } else if (!wanted) {
    most = 0;
  }
  return { memory: await planWith(most), checkpointedLayers: most };
}

function rehearsed({ core, steps, heaviest, outside }: Planned, options: ResolvedTrainerOptions): Promise<MemoryPlan> {
  return rehearse(core, options, steps, heaviest, outside);
}

/** @throws ERR_QLORA_MEMORY_PLAN where the plan is above maxMemory, with changes that would fit */
async function refuseAbove(planned: Planned, plan: MemoryPlan): Promise<void> {
  const { maxMemory } = planned.options;
  if (maxMemory === undefined || plan.total <= maxMemory) return;
  const { total, ...classes } = plan;
  const parts = Object.entries(classes).map(([name, bytes]) => `${name} ${showBytes(bytes)}`);
  throw new QLoRAError(
    'ERR_QLORA_MEMORY_PLAN',
    `training takes ${showBytes(total)} of memory (${parts.join(', ')}), maxMemory is ${showBytes(maxMemory)}`,
    { hint: await advice(planned, maxMemory), detail: { plan, maxMemory } },
  );
}

/** A change of options, as a person would write it. */
interface Change {
  text: string;
  options: Partial<ResolvedTrainerOptions>;
}

/** Which changes would make the run fit: each alone, or else all together. */
async function advice(planned: Planned, maxMemory: number): Promise<string> {
  const { heaviest } = planned;
  const totalWith = async (change: Partial<ResolvedTrainerOptions>) => {
    const options = { ...planned.options, ...change };
    return (await rehearsed({ ...planned, heaviest: reduced(heaviest, options) }, options)).total;
  };
  const alone: string[] = [];
  let least = Number.POSITIVE_INFINITY;
  const strongest: Change[] = [];
  for (const kind of changesOf(planned)) {
    for (const change of kind) {
      if ((await totalWith(change.options)) > maxMemory) continue;
      alone.push(change.text);
      break;
    }
    strongest.push(...kind.slice(-1));
  }
  if (alone.length > 0) return `Any of these would fit: ${alone.join('; ')}.`;
  const all: Change[] = [];
  for (const change of strongest) {
    all.push(change);
    least = await totalWith(Object.assign({}, ...all.map(({ options }) => options)));
    if (least <= maxMemory) return `These together would fit: ${all.map(({ text }) => text).join(', ')}.`;
  }
  const tried =
    all.length > 0 ? `Even with ${all.map(({ text }) => text).join(', ')} it takes ${showBytes(least)}. ` : '';
  return `${tried}Raise maxMemory, or take a smaller model or fewer bits.`;
}

/** What may be changed, kind by kind, each from the mildest change on. */
function changesOf({ options, heaviest }: Planned): Change[][] {
  const { batchSize, gradientAccumulationSteps: accumulation, gradientCheckpointing, lora } = options;
  const halves = (from: number, least: number) => {
    const values: number[] = [];
    for (let n = Math.floor(from / 2); n >= least; n = Math.floor(n / 2)) values.push(n);
    return values;
  };
  const longest = Math.max(...heaviest.train.flat(2).map(({ ids }) => ids.length));
  const r = lora === 'none' || options.initialAdapter ? 0 : (lora?.r ?? 64);
  const checkpointing = gradientCheckpointing === false;
  return [
    checkpointing ? [{ text: 'gradientCheckpointing: true', options: { gradientCheckpointing: true } }] : [],
    halves(batchSize, 1).map((n) => ({
      text: `batchSize: ${n} with gradientAccumulationSteps: ${Math.ceil((accumulation * batchSize) / n)}`,
      options: { batchSize: n },
    })),
    halves(Math.min(longest, packedLength(options)), 32).map((n) => ({
      text: `maxLength: ${n}`,
      options: { maxLength: n },
    })),
    halves(r, 4).map((n) => ({ text: `lora: { r: ${n} }`, options: { lora: { ...(lora as object), r: n } } })),
    lora === 'none' ? [{ text: "an adapter in place of lora: 'none'", options: { lora: {} } }] : [],
  ].filter((kind) => kind.length > 0);
}

/** The micro-batches under a smaller batchSize or maxLength: the longest of their sequences, cut. */
function reduced(heaviest: Heaviest, { batchSize, maxLength }: ResolvedTrainerOptions): Heaviest {
  const reduce = (batch: readonly Sequence[]) =>
    [...batch]
      .sort((a, b) => lengthOf(b) - lengthOf(a))
      .slice(0, batchSize)
      .map((sequence) => cut(sequence, maxLength ?? Number.POSITIVE_INFINITY));
  return { train: heaviest.train.map(reduce), eval: heaviest.eval.map(reduce) };
}

/** The first `most` tokens of a sequence. */
function cut(sequence: Sequence, most: number): Sequence {
  let left = most;
  return sequence.flatMap(({ ids, labels }) => {
    const n = Math.min(left, ids.length);
    left -= n;
    return n > 0 ? [{ ids: ids.subarray(0, n), labels: labels.subarray(0, n) }] : [];
  });
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

/** With three digits, in units of 1000. */
function showBytes(bytes: number): string {
  const unit = [
    [1e9, 'GB'],
    [1e6, 'MB'],
    [1e3, 'kB'],
  ].find(([size]) => bytes >= (size as number)) ?? [1, 'bytes'];
  return `${Number((bytes / (unit[0] as number)).toPrecision(3))} ${unit[1]}`;
}
