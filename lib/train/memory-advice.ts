/** What to change where a run does not fit in memory. */
import { lengthOf, type Sequence } from '../data/batch.js';
import { freeBytes } from '../devices.js';
import { QLoRAError } from '../errors.js';
import { bytes } from '../format.js';
import { budgetOf, chooseMemory } from './memory-plan.js';
import { optimizerKinds } from './optimizer-kinds.js';
import type { ResolvedTrainerOptions } from './options.js';
import type { Heaviest, MemoryPlan, Rehearsal } from './rehearsal.js';
import { packedLength } from './step-plan.js';

/** @throws ERR_QLORA_MEMORY_PLAN where the plan is above its budget, with changes that would fit */
export async function refuseAbove(run: Rehearsal, plan: MemoryPlan): Promise<void> {
  refuseAboveHost(plan);
  const budget = budgetOf(run);
  if (!budget || plan.total <= budget.bytes) return;
  const { total, pinned: _, ...classes } = plan;
  const parts = Object.entries(classes).map(([name, n]) => `${name} ${bytes(n)}`);
  throw new QLoRAError(
    'ERR_QLORA_MEMORY_PLAN',
    `training takes ${bytes(total)} of memory (${parts.join(', ')}), ${budget.reason}`,
    { hint: await advice(run, budget.bytes), detail: { plan, maxMemory: budget.bytes } },
  );
}

/** Pinned memory cannot be swapped out: the system would stop something else for it. */
function refuseAboveHost(plan: MemoryPlan): void {
  const free = freeBytes('cpu');
  if (lackOfHost(plan, free) === 0) return;
  throw new QLoRAError(
    'ERR_QLORA_MEMORY_PLAN',
    `activationOffloading takes ${bytes(plan.pinned ?? 0)} of the host's memory, which has ${bytes(free)} for it`,
    { hint: 'Take a smaller batchSize or maxLength, or leave activationOffloading out.', detail: { plan } },
  );
}

/** Bytes that would be pinned and that the host does not have. */
const lackOfHost = ({ pinned = 0 }: MemoryPlan, free = freeBytes('cpu')) => Math.max(0, pinned - free);

/** A change of options, as a person would write it. */
interface Change {
  text: string;
  options: Partial<ResolvedTrainerOptions>;
}

/** Which changes would make the run fit into so many bytes: each alone, or else all together. */
async function advice(run: Rehearsal, maxMemory: number): Promise<string> {
  const { heaviest } = run;
  const totalWith = async (change: Partial<ResolvedTrainerOptions>) => {
    const options = { ...run.options, ...change };
    const { memory } = await chooseMemory({ ...run, options, heaviest: reduced(heaviest, options) });
    return memory.total + lackOfHost(memory);
  };
  const alone: string[] = [];
  let least = Number.POSITIVE_INFINITY;
  const strongest: Change[] = [];
  for (const kind of changesOf(run)) {
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
  const tried = all.length > 0 ? `Even with ${all.map(({ text }) => text).join(', ')} it takes ${bytes(least)}. ` : '';
  const more = run.options.maxMemory === undefined ? 'Free memory of the device' : 'Raise maxMemory';
  return `${tried}${more}, or take a smaller model or fewer bits.`;
}

/** What may be changed, kind by kind, each from the mildest change on. */
function changesOf({ core, options, heaviest }: Rehearsal): Change[][] {
  const { batchSize, gradientAccumulationSteps: accumulation, gradientCheckpointing, lora } = options;
  const halves = (from: number, least: number) => {
    const values: number[] = [];
    for (let n = Math.floor(from / 2); n >= least; n = Math.floor(n / 2)) values.push(n);
    return values;
  };
  const longest = Math.max(...heaviest.train.flat(2).map(({ ids }) => ids.length));
  const r = lora === 'none' || options.initialAdapter ? 0 : (lora?.r ?? 64);
  const checkpointing = gradientCheckpointing === false;
  const offloading = core.stream.device !== 'cpu' && !options.activationOffloading;
  const paged = `paged_${options.optimizer}` as typeof options.optimizer;
  return [
    checkpointing ? [{ text: 'gradientCheckpointing: true', options: { gradientCheckpointing: true } }] : [],
    offloading ? [{ text: 'activationOffloading: true', options: { activationOffloading: true } }] : [],
    paged in optimizerKinds ? [{ text: `optimizer: '${paged}'`, options: { optimizer: paged } }] : [],
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
