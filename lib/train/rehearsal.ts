/**
 * What a run takes in memory, found by going through its steps on a stream that computes nothing and counts: the same
 * code allocates the same bytes in the same order, so nothing has to be kept in step with it.
 */
import { tmpdir } from 'node:os';
import type { Sequence } from '../data/batch.js';
import type { ModelCore } from '../models/core.js';
import { emptyCopy } from '../models/empty-copy.js';
import { createAdapter, type LoraAdapter, loadAdapter } from '../models/lora-adapter.js';
import { zeros } from '../ops/elementwise.js';
import { Stream } from '../tensor.js';
import { enqueueLoss } from './micro-step.js';
import { Optimizer, type Paging } from './optimizer.js';
import { stateBytes } from './optimizer-kinds.js';
import type { ResolvedTrainerOptions } from './options.js';
import type { StepPlan } from './step-plan.js';
import { Stepper } from './stepper.js';

/** Bytes on the device at the moment of most memory; the classes add up to the total. */
export interface MemoryPlan {
  weights: number;
  /** A and B, or what else an adapter trains. */
  adapters: number;
  /** Gradients and the optimizer's state. */
  optimizer: number;
  /** What is kept for the backward pass, at most. */
  activations: number;
  /** What operations need while they run, and what loading takes beyond all of training. */
  scratch: number;
  total: number;
  /** With activationOffloading: bytes of pinned memory of the host, which are not the device's. */
  pinned?: number;
}

/** Micro-batches that a run will meet: those that may take most memory. */
export interface Heaviest {
  train: readonly (readonly Sequence[])[];
  eval: readonly (readonly Sequence[])[];
}

/** Memory that is not training's. */
export interface Outside {
  /** The most bytes that loading the model takes. */
  loading: number;
  /** Bytes of adapters that the model has beside the one that is trained. */
  others: number;
}

export const adapterName = 'default';

/** The adapter that the options ask for, on `core`; undefined in full fine-tuning. */
async function adapterFor(core: ModelCore, options: ResolvedTrainerOptions): Promise<LoraAdapter | undefined> {
  const { lora, initialAdapter, seed } = options;
  if (initialAdapter) return loadAdapter(core, adapterName, initialAdapter);
  return lora === 'none' ? undefined : createAdapter(core, adapterName, { seed, ...lora });
}

/** What is gone through. */
export interface Rehearsal {
  core: ModelCore;
  options: ResolvedTrainerOptions;
  steps: StepPlan;
  heaviest: Heaviest;
  outside: Outside;
  paging?: Pick<Paging, 'residentBytes' | 'slotBytes'>;
}

/**
 * Trains on each of the heaviest micro-batches and evaluates, without computing anything.
 *
 * @returns the plan, and the bytes of the optimizer's state, paged or not
 */
export async function rehearse({ core, options, steps, heaviest, outside, paging }: Rehearsal) {
  const stream = new Stream(core.stream.device, 'rehearsal');
  try {
    const copy = emptyCopy(core, stream);
    const adapter = await adapterFor(copy, options);
    const trained = adapter?.namedParameters ?? copy.weights.dense;
    const parameters = [...trained.values()];
    const optimizer = await Optimizer.create(trained, options, {
      totalSteps: steps.totalSteps,
      computeDtype: core.computeDtype,
      paging: paging && { ...paging, directory: tmpdir() }, // where nothing is written
    });
    const stepper = new Stepper(copy, adapter?.name, parameters, optimizer, steps, options);
    // The losses of a step, which wait to be read.
    using _losses = zeros(stream, [2 * options.gradientAccumulationSteps], 'f32');
    for (const sequences of heaviest.train) await (await stepper.enqueue(sequences))?.result;
    for (const sequences of heaviest.eval) {
      enqueueLoss(copy, undefined, sequences, 1, { adapter: adapter?.name, checkpointing: 'none' }).dispose();
    }
    await stream.sync();
    const shapes = parameters.map(({ shape }) => shape);
    return { plan: planOf(stream.memory(), outside), stateBytes: stateBytes(options, shapes) };
  } finally {
    await stream.close();
  }
}

function planOf(memory: ReturnType<Stream['memory']>, outside: Outside): MemoryPlan {
  const { peakBytes, byClass, peakByClass, pinnedPeakBytes } = memory;
  const { weights, adapters, optimizer } = byClass as Record<keyof MemoryPlan, number>;
  const training = Math.max(peakBytes, outside.loading);
  const rest = training - weights - adapters - optimizer;
  const activations = Math.min(peakByClass.activations as number, rest);
  return {
    weights,
    adapters: adapters + outside.others,
    optimizer,
    activations,
    scratch: rest - activations,
    total: training + outside.others,
    ...(pinnedPeakBytes > 0 && { pinned: pinnedPeakBytes }),
  };
}
