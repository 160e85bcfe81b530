import type { Tape } from '../autograd.js';
import { collate, type Sequence, shiftLabels } from '../data/batch.js';
import { IGNORED } from '../data/encode.js';
import type { RowStore } from '../data/row-store.js';
import { decoderOf, hiddenStates, type ModelCore } from '../models/core.js';
import type { DecoderPass } from '../models/decoder.js';
import { fill } from '../ops/elementwise.js';
import { linearCrossEntropy } from '../ops/linear-cross-entropy.js';
import { Tensor } from '../tensor.js';
import type { ResolvedTrainerOptions } from './options.js';

/** What a step computed, read once the stream has come to it. */
export interface StepResult {
  loss: number;
  gradNorm: number;
  finite: boolean;
  /** What f16's loss was scaled by in this step; 1 otherwise. */
  lossScale: number;
  tokens: number;
}

/** A step whose work is in the queue. */
export interface EnqueuedStep {
  /** From 1. */
  step: number;
  /** What it was made of: its sequences, and the number of the first of its micro-steps. */
  sequences: readonly Sequence[];
  firstMicroStep: number;
  learningRate: number;
  result: Promise<StepResult>;
}

/**
 * Micro-steps of a step: items of like length side by side, `batchSize` at a time. Their sum is the same whatever their
 * order, and the padding least.
 */
export function microBatches<T>(items: readonly T[], tokens: (item: T) => number, batchSize: number): T[][] {
  const sorted = [...items].sort((a, b) => tokens(a) - tokens(b));
  return Array.from({ length: Math.ceil(sorted.length / batchSize) }, (_, i) =>
    sorted.slice(i * batchSize, (i + 1) * batchSize),
  );
}

/** The rows of each pass of an evaluation, by number. */
export function evalBatches(rows: RowStore, batchSize: number): number[][] {
  return microBatches([...Array(rows.count).keys()], (i) => rows.tokens(i), batchSize);
}

/**
 * Where labels count, if so many do not that leaving them out of the last layer is worth copying the rest; at least one
 * position, so that there is a pass.
 */
function countedPositions(labels: Int32Array): Int32Array | undefined {
  const counted = Int32Array.from(labels.keys()).filter((i) => labels[i] !== IGNORED);
  if (counted.length > 0.9 * labels.length) return undefined;
  return counted.length > 0 ? counted : Int32Array.of(0);
}

/**
 * Enqueues the loss of some sequences, times `scale`, and with a tape its gradients, times `lossScale` [1] as well.
 *
 * @returns the loss [1], to be read and disposed of
 */
export function enqueueLoss(
  core: ModelCore,
  tape: Tape | undefined,
  sequences: readonly Sequence[],
  scale: number,
  pass: Omit<DecoderPass, 'computeDtype'>,
  lossScale?: Tensor,
): Tensor {
  const batch = collate(sequences, { padId: core.tokenizer?.padTokenId ?? 0 });
  // A row by itself has neither padding nor neighbours: its tokens are one segment.
  const segments = sequences.length > 1 || sequences[0]?.length !== 1 ? { segmentIds: batch.segmentIds } : {};
  const { tokens, batch: B, length, positions } = batch;
  const all = shiftLabels(batch);
  const wanted = countedPositions(all);
  const targets = wanted ? wanted.map((i) => all[i] as number) : all;
  using hidden = hiddenStates(core, tape, { tokens, batch: B, length, positions, ...segments, wanted }, pass);
  using labels = Tensor.from(core.stream, targets, [targets.length]);
  const loss = linearCrossEntropy(tape, hidden, decoderOf(core, pass.adapter).head, labels, { scale, lossScale });
  if (tape) {
    using one = new Tensor(core.stream, 'f32', [1]);
    fill(one, 1);
    tape.backward(loss, one);
  }
  return loss;
}

/** What the decoder is to compute again. 'auto' has become a number of layers when training begins. */
export function checkpointingOf({ gradientCheckpointing: of }: ResolvedTrainerOptions): DecoderPass['checkpointing'] {
  return typeof of === 'number' ? of : of ? 'blocks' : 'none';
}

/** Whoever awaits it is told of a failure; one that nobody comes to await any more is no unhandled rejection. */
export function handled<T>(promise: Promise<T>): Promise<T> {
  promise.catch(() => {});
  return promise;
}

/** The one number that a tensor holds, which is disposed of. */
export async function readScalar(tensor: Tensor): Promise<number> {
  using t = tensor;
  return (await t.read())[0] as number;
}
