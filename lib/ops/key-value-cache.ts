import type { Tensor } from '../tensor.js';

/**
 * Copies rows of a cache, or moves those of one, in place: cache[b, t] = source[from[b], t] for begin <= t < end, where
 * source may be the cache itself. Not differentiable.
 *
 * @param source [B', S', Hkv, D]
 * @param from i32 [B], each in [0, B'), or -1, which leaves the row as it is
 * @param cache [B, S, Hkv, D] of the same dtype
 */
export function gatherKeyValue(source: Tensor, from: Tensor, cache: Tensor, begin: number, end: number): void {
  source.stream.run('gatherKeyValue', source, from, cache, begin, end);
}
