import { zeros } from '../ops/elementwise.js';
import { gatherKeyValue } from '../ops/key-value-cache.js';
import { type FloatDType, type Stream, Tensor } from '../tensor.js';
import type { DecoderConfig } from './config.js';

/** Keys and values of the tokens so far, for each layer [B, S, G, D] with room for S a row. */
export class KeyValueCache implements Disposable {
  #lengths: Int32Array;
  /** i32 [B]: the lengths, for the operations that go on from there. */
  readonly ends: Tensor;
  readonly #layers: { keys: Tensor; values: Tensor }[];

  constructor(
    readonly stream: Stream,
    config: DecoderConfig,
    readonly batch: number,
    readonly capacity: number,
    dtype: FloatDType,
  ) {
    const shape = [batch, capacity, config.numKvHeads, config.headDim];
    this.#lengths = new Int32Array(batch);
    this.ends = Tensor.from(stream, this.#lengths, [batch]);
    this.#layers = Array.from({ length: config.numLayers }, () => ({
      keys: zeros(stream, shape, dtype),
      values: zeros(stream, shape, dtype),
    }));
  }

  /** Tokens that each row holds. */
  get lengths(): Int32Array {
    return this.#lengths;
  }

  layer(index: number): { keys: Tensor; values: Tensor } {
    return this.#layers[index] as { keys: Tensor; values: Tensor };
  }

  /** After all layers have appended theirs to each row. */
  advance(tokens: number): void {
    this.#setLengths(this.#lengths.map((n) => n + tokens));
  }

  #setLengths(lengths: Int32Array): void {
    this.#lengths = lengths;
    this.ends.write(lengths).catch(() => {}); // who reads it fails with it
  }

  /**
   * Row b becomes what row from[b] of `source` holds, from the token `begin` on: before it the two are the same already.
   * -1 leaves a row alone. `source`, whose rows are of one length, may be this cache.
   */
  gather(source: KeyValueCache, from: Int32Array, begin: number): void {
    const end = Math.max(...source.lengths);
    this.#setLengths(this.#lengths.map((n, b) => (from[b] === -1 ? n : end)));
    if (source === this && from.every((row, b) => row === b)) return;
    using rows = Tensor.from(this.stream, from, [this.batch]);
    this.#layers.forEach(({ keys, values }, i) => {
      const layer = source.layer(i);
      gatherKeyValue(layer.keys, rows, keys, begin, end);
      gatherKeyValue(layer.values, rows, values, begin, end);
    });
  }

  dispose(): void {
    this.ends.dispose();
    for (const { keys, values } of this.#layers) {
      keys.dispose();
      values.dispose();
    }
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}
