import type { Tensor } from '../tensor.js';

/**
 * Writes rows into a cache of keys or values, in place: cache[b, at + t] = rows[b, t]. Not differentiable.
 *
 * @param rows [B, T, Hkv, D]
 * @param cache [B, S, Hkv, D] of the same dtype, at + T <= S
 */
export function appendKeyValue(rows: Tensor, cache: Tensor, at: number): void {
  rows.stream.run('appendKeyValue', rows, cache, at);
}
