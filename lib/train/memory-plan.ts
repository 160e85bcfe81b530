/** How a run is made to fit in memory: what it computes again, and what it keeps on the disk. */
import { freeBytes } from '../devices.js';
import { bytes } from '../format.js';
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

/** Bytes that a run may take, and what says so. */
export interface Budget {
  bytes: number;
  reason: string;
}

/** maxMemory, or what a device has left, which beside it takes no swapping; undefined where the system may swap. */
export function budgetOf({ core, options: { maxMemory } }: Pick<Rehearsal, 'core' | 'options'>): Budget | undefined {
  if (maxMemory !== undefined) return { bytes: maxMemory, reason: `maxMemory is ${bytes(maxMemory)}` };
  const { device } = core.stream;
  if (device === 'cpu') return undefined;
  // A model that is given is there already, and what its allocator keeps is used again. A rehearsal takes nothing.
  const there = core.stream.purpose === 'rehearsal' ? 0 : core.stream.memory().mappedBytes;
  const free = freeBytes(device) + there;
  return { bytes: free, reason: `${device} has ${bytes(free)} for it` };
}

/**
 * The plan of a run. Where it is above its budget, a paged optimizer's state goes out of the device's memory, as much of
 * it as must; with `gradientCheckpointing: 'auto'` then as few layers are computed again as the budget allows, or where
 * there is none, what the system has left for this process.
 */
export async function chooseMemory(run: Rehearsal): Promise<MemoryChoice> {
  const { core, options } = run;
  const layers = core.config.numLayers;
  const { gradientCheckpointing: wanted } = options;
  const limit = budgetOf(run)?.bytes;
  const budget = limit ?? (wanted === 'auto' ? freeBytes('cpu') : Number.POSITIVE_INFINITY);
  const [fewest, most] = wanted === 'auto' ? [0, layers] : [wanted, wanted].map((of) => layersOf(of, layers));
  const rehearseWith = (count: number, paging?: Rehearsal['paging']) =>
    rehearse({ ...run, options: { ...options, gradientCheckpointing: count }, paging });
  const whole = await rehearseWith(fewest as number);
  const slots = { residentBytes: 0, slotBytes: slotBytesOf(whole.stateBytes) };
  const saves = whole.stateBytes > pageSlots * slots.slotBytes && optimizerKinds[options.optimizer].pages;
  const pages = limit !== undefined && saves && whole.plan.total > budget;
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
