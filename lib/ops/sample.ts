import { Tensor } from '../tensor.js';

export interface SampleOptions {
  /** Divides the logits; 0 takes the largest (the lowest id among equals), whatever the rest says. Default 1. */
  temperature?: number;
  /** Keeps this many of the largest logits; 0, the default, keeps all. */
  topK?: number;
  /** Keeps the most likely tokens whose probabilities first reach this sum, in (0, 1]; default 1. */
  topP?: number;
  seed: number;
  /** A number that no other draw of the seed has: the token's position. */
  stream: number;
}

/**
 * Draws one token a row, in the order of transformers' logits processors: temperature, top-k, top-p. Fails with
 * ERR_QLORA_NON_FINITE where a row holds NaN or infinity or only -infinity.
 *
 * @param logits f32 [B, V]; -infinity forbids a token
 * @returns i32 [B]
 */
export function sample(logits: Tensor, { temperature = 1, topK = 0, topP = 1, seed, stream }: SampleOptions): Tensor {
  const ids = new Tensor(logits.stream, 'i32', [logits.dim(0)]);
  logits.stream.run('sample', logits, ids, temperature, topK, topP, seed, stream);
  return ids;
}
