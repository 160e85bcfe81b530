import type { Tape } from '../autograd.js';
import { collate, shiftLabels } from '../data/batch.js';
import type { EncodedRow } from '../data/encode.js';
import { decoderOf, hiddenStates, type ModelCore } from '../models/core.js';
import type { DecoderPass } from '../models/decoder.js';
import { fill } from '../ops/elementwise.js';
import { linearCrossEntropy } from '../ops/linear-cross-entropy.js';
import { Tensor } from '../tensor.js';

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
  /** What it was made of: its rows, and the number of the first of its micro-steps. */
  rows: readonly EncodedRow[];
  firstMicroStep: number;
  learningRate: number;
  result: Promise<StepResult>;
}

/**
 * Enqueues the loss of some rows, times `scale`, and with a tape its gradients, times `lossScale` [1] as well.
 *
 * @returns the loss [1], to be read and disposed of
 */
export function enqueueLoss(
  core: ModelCore,
  tape: Tape | undefined,
  rows: readonly EncodedRow[],
  scale: number,
  pass: Omit<DecoderPass, 'computeDtype'>,
  lossScale?: Tensor,
): Tensor {
  const batch = collate(rows, { padId: core.tokenizer?.padTokenId ?? 0 });
  // One row has no padding, and its tokens are one segment.
  const segments = batch.batch > 1 ? { segmentIds: batch.segmentIds } : {};
  const { tokens, batch: B, length, positions } = batch;
  using hidden = hiddenStates(core, tape, { tokens, batch: B, length, positions, ...segments }, pass);
  using labels = Tensor.from(core.stream, shiftLabels(batch), [B * length]);
  const loss = linearCrossEntropy(tape, hidden, decoderOf(core, pass.adapter).head, labels, { scale, lossScale });
  if (tape) {
    using one = new Tensor(core.stream, 'f32', [1]);
    fill(one, 1);
    tape.backward(loss, one);
  }
  return loss;
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
