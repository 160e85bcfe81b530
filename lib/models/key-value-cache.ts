import { zeros } from '../ops/elementwise.js';
import { gatherKeyValue } from '../ops/key-value-cache.js';
import { type FloatDType, type Stream, Tensor } from '../tensor.js';
import type { DecoderConfig } from './config.js';

/** Keys and values of the tokens so far, for each layer [B, S, G, D] with room for S. */
export class KeyValueCache implements Disposable {
  #length = 0;
  /** i32 [1]: its length, for the operations that go on from there. */
  readonly end: Tensor;
  readonly #layers: { keys: Tensor; values: Tensor }[];

  constructor(
    readonly stream: Stream,
    config: DecoderConfig,
    readonly batch: number,
    readonly capacity: number,
    dtype: FloatDType,
  ) {
    this.end = Tensor.from(stream, Int32Array.of(0), [1]);
    const shape = [batch, capacity, config.numKvHeads, config.headDim];
    this.#layers = Array.from({ length: config.numLayers }, () => ({
      keys: zeros(stream, shape, dtype),
      values: zeros(stream, shape, dtype),
    }));
  }

  /** Tokens that it holds. */
  get length(): number {
    return this.#length;
  }

  layer(index: number): { keys: Tensor; values: Tensor } {
    return this.#layers[index] as { keys: Tensor; values: Tensor };
  }

  /** After all layers have appended theirs. */
  advance(tokens: number): void {
    this.#setLength(this.#length + tokens);
  }

  #setLength(length: number): void {
    this.#length = length;
    this.end.write(Int32Array.of(length)).catch(() => {}); // who reads it fails with it
  }

  /**
   * Row b becomes what row from[b] of `source` holds, from the token `begin` on; before it all rows are the same already.
   * `source` may be this cache.
   */
  gather(source: KeyValueCache, from: Int32Array, begin: number): void {
    if (source !== this) this.#setLength(source.length);
    if (source === this && from.every((row, b) => row === b)) return;
    using rows = Tensor.from(this.stream, from, [this.batch]);
    this.#layers.forEach(({ keys, values }, i) => {
      const layer = source.layer(i);
      gatherKeyValue(layer.keys, rows, keys, begin, source.length);
      gatherKeyValue(layer.values, rows, values, begin, source.length);
    });
  }

  dispose(): void {
    this.end.dispose();
    for (const { keys, values } of this.#layers) {
      keys.dispose();
      values.dispose();
    }
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}
