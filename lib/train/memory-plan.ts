/** How a run is made to fit in memory: what it computes again, and what it keeps on the disk. */
import { pageSlots } from '../io/page-file.js';
import { defaultSlotBytes } from './optimizer.js';
import { optimizerKinds } from './optimizer-kinds.js';
import { type MemoryPlan, type Rehearsal, rehearse } from './rehearsal.js';

/** A slot holds a few pieces of any optimizer's state. */
const smallestSlot = 2 ** 20;

/** How a run is brought below its budget. */
export interface MemoryChoice {
  memory: MemoryPlan;
  /** Layers that are computed again in the backward pass. */
  checkpointedLayers: number;
  /** undefined where the optimizer's state stays in memory. */
  paging: Rehearsal['paging'];
}

/**
 * The plan of a run. Where it is above maxMemory, a paged optimizer's state goes to the disk, as much of it as must; with
 * `gradientCheckpointing: 'auto'` then as few layers are computed again as the budget allows: that is maxMemory or,
 * without it, what the system has left for this process.
 */
export async function chooseMemory(run: Rehearsal): Promise<MemoryChoice> {
  const { core, options } = run;
  const layers = core.config.numLayers;
  const { gradientCheckpointing: wanted, maxMemory } = options;
  const budget = maxMemory ?? (wanted === 'auto' ? process.availableMemory() : Number.POSITIVE_INFINITY);
  const [fewest, most] = wanted === 'auto' ? [0, layers] : [wanted, wanted].map((of) => layersOf(of, layers));
  const rehearseWith = (count: number, paging?: Rehearsal['paging']) =>
    rehearse({ ...run, options: { ...options, gradientCheckpointing: count }, paging });
  const whole = await rehearseWith(fewest as number);
  const slots = { residentBytes: 0, slotBytes: slotBytesOf(whole.stateBytes) };
  const saves = whole.stateBytes > pageSlots * slots.slotBytes && optimizerKinds[options.optimizer].pages;
  const pages = maxMemory !== undefined && saves && whole.plan.total > budget;
  const leastOf = async (count: number) => (await rehearseWith(count, pages ? slots : undefined)).plan;
  // More layers never take more memory: the fewest that fit are found by halving.
  let [least, count] = [fewest as number, most as number];
  while (least < count) {
    const middle = Math.floor((least + count) / 2);
    if ((await leastOf(middle)).total <= budget) count = middle;
    else least = middle + 1;
  }
  const { total } = await leastOf(count);
  const paging = pages ? { ...slots, residentBytes: Math.max(0, budget - total) } : undefined;
  return { memory: (await rehearseWith(count, paging)).plan, checkpointedLayers: count, paging };
}

function layersOf(wanted: boolean | 'auto' | number, layers: number): number {
  return typeof wanted === 'number' ? wanted : wanted ? layers : 0;
}

/** Three slots are a fifth of the state at most, unless that is tiny. */
function slotBytesOf(stateBytes: number): number {
  const wanted = Math.ceil(stateBytes / 16 / smallestSlot) * smallestSlot;
  return Math.min(defaultSlotBytes, Math.max(smallestSlot, wanted));
}
