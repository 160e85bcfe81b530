/** The choice of the next token; csrc/ops/logits_choose.h has the formulas. Logits that are not finite fail with ERR_QLORA_NON_FINITE. */
import { Tensor } from '../tensor.js';

/** The likeliest token of each row, the lowest id among equals: f32 [B, V] to i32 [B]. */
export function argmax(logits: Tensor): Tensor {
  const ids = new Tensor(logits.stream, 'i32', [logits.dim(0)]);
  logits.stream.run('argmax', logits, ids);
  return ids;
}

export interface DrawOptions {
  seed: number;
  /** A number that no other draw of the seed has: the token's position. */
  stream: number;
}

/**
 * Draws a token of each row from softmax.
 *
 * @param logits f32 [B, V]; -infinity forbids a token
 * @returns i32 [B]
 */
export function sample(logits: Tensor, { seed, stream }: DrawOptions): Tensor {
  const ids = new Tensor(logits.stream, 'i32', [logits.dim(0)]);
  logits.stream.run('sample', logits, ids, seed, stream);
  return ids;
}

export interface BeamCandidatesOptions extends DrawOptions {
  /** How many to choose. */
  count: number;
  /** 0 chooses the best; 1 draws without replacement. */
  noise: number;
}

/**
 * The best continuations of all beams, or as many drawn from softmax over all of them.
 *
 * @param logProbs f32 [B, V]
 * @param running f32 [B]: what is added to the rows; -infinity for a beam that is dead
 * @returns places i32 [count], each beam * V + token, and their scores f32 [count]; -infinity where nothing is left
 */
export function beamCandidates(
  logProbs: Tensor,
  running: Tensor,
  { count, noise, seed, stream }: BeamCandidatesOptions,
): { places: Tensor; scores: Tensor } {
  const places = new Tensor(logProbs.stream, 'i32', [count]);
  const scores = new Tensor(logProbs.stream, 'f32', [count]);
  logProbs.stream.run('beamCandidates', logProbs, running, places, scores, noise, seed, stream);
  return { places, scores };
}
