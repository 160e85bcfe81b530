/** What changes logits between the model and the choice of a token; csrc/ops/logits_process.h has the formulas. */
import { Tensor } from '../tensor.js';

/** z - log sum e^z of each row: f32 [B, V] to f32 [B, V]. */
export function logSoftmax(logits: Tensor): Tensor {
  const out = new Tensor(logits.stream, 'f32', logits.shape);
  logits.stream.run('logSoftmax', logits, out);
  return out;
}

export interface ConstrainOptions {
  /** i32 [B, S]: the ids of each row so far, of which the first seenLength columns count. */
  seen?: Tensor;
  seenLength?: number;
  /** Divides logits of seen tokens that are not negative, multiplies the rest; 1, the default, changes nothing. */
  repetitionPenalty?: number;
  /** Forbids what would complete so many tokens that were seen in this order; 0, the default, forbids nothing. */
  noRepeatNgramSize?: number;
  /** i32 [E]: ids that are forbidden in every row. */
  forbidden?: Tensor;
}

/**
 * Repetition penalty, no repeated n-grams, forbidden tokens. A row of which nothing is left fails with
 * ERR_QLORA_NO_TOKEN_LEFT.
 *
 * @param logits f32 [B, V]
 */
export function constrainLogits(
  logits: Tensor,
  { seen, seenLength = 0, repetitionPenalty = 1, noRepeatNgramSize = 0, forbidden }: ConstrainOptions,
): Tensor {
  const out = new Tensor(logits.stream, 'f32', logits.shape);
  logits.stream.run('constrainLogits', logits, seen, forbidden, out, seenLength, repetitionPenalty, noRepeatNgramSize);
  return out;
}

export interface WarpOptions {
  /** Divides the logits; above 0. Default 1. */
  temperature?: number;
  /** Keeps this many of the largest logits; 0, the default, keeps all. */
  topK?: number;
  /** Keeps the most likely tokens whose probabilities first reach this sum, in (0, 1]; default 1. */
  topP?: number;
  /** Keeps those nearest to the entropy whose probabilities first reach this sum, in (0, 1]; default 1. */
  typicalP?: number;
  /** How many each of the three keeps at least; default 1. */
  keep?: number;
}

/** Temperature, top-k, top-p, typical-p, in this order: f32 [B, V], with -infinity for what is dropped. */
export function warpLogits(
  logits: Tensor,
  { temperature = 1, topK = 0, topP = 1, typicalP = 1, keep = 1 }: WarpOptions,
): Tensor {
  const out = new Tensor(logits.stream, 'f32', logits.shape);
  logits.stream.run('warpLogits', logits, out, temperature, topK, topP, typicalP, keep);
  return out;
}
