import type { Tape } from '../autograd.js';
import { Tensor } from '../tensor.js';

/** Cosine and sine of every token's angles, f32 [M, R / 2] each. */
export interface RopeTable {
  cos: Tensor;
  sin: Tensor;
}

/**
 * Fills the table for `rope`: cos and sin of fp32(position * inverse frequency), times factor.
 *
 * @param positions i32 [M]
 * @param inverseFrequencies f32 [R / 2], radians a position
 * @param factor scales both; 1 but for some long-context variants
 */
export function ropeTable(
  positions: Tensor,
  inverseFrequencies: Tensor,
  factor: number,
  { cos, sin }: RopeTable,
): void {
  positions.stream.run('ropeTable', positions, inverseFrequencies, cos, sin, factor);
}

/**
 * Turns the first R dimensions of every head by its token's angles: pairs are (r, r + R / 2), as in GPT-NeoX. The rest
 * passes through.
 *
 * @param x [.., H, D] of any float dtype, whose leading dimensions multiply to the M of the table; y has the same
 */
export function rope(tape: Tape | undefined, x: Tensor, { cos, sin }: RopeTable): Tensor {
  const y = new Tensor(x.stream, x.dtype, x.shape);
  x.stream.run('rope', x, cos, sin, y, 1);
  tape?.record([x], [y], [cos, sin], ([dy]) => {
    const dx = new Tensor(x.stream, x.dtype, x.shape);
    x.stream.run('rope', dy, cos, sin, dx, -1);
    return [dx];
  });
  return y;
}

/** A layer's keys and values, [B, S, G, D] each, with room for tokens to come. */
export interface LayerCache {
  keys: Tensor;
  values: Tensor;
}

/**
 * What attention over a cache needs of T new tokens a row: their keys, turned as `rope` does, and their values are
 * written into it, keys[b, at[b] + t] = rope(k)[b, t], and their turned queries returned. Not differentiable.
 *
 * @param q [B, T, H, D]
 * @param k [B, T, G, D] of the same dtype, as the cache
 * @param v [B, T, G, D]
 * @param at i32 [B]; at[b] + T > S fails with ERR_QLORA_SHAPE
 */
export function ropeAppend(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  { cos, sin }: RopeTable,
  { keys, values }: LayerCache,
  at: Tensor,
): Tensor {
  const turned = new Tensor(q.stream, q.dtype, q.shape);
  q.stream.run('ropeAppend', q, k, v, cos, sin, at, turned, keys, values);
  return turned;
}
