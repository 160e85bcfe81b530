import { zeros } from '../ops/elementwise.js';
import type { FloatDType, Stream, Tensor } from '../tensor.js';
import type { DecoderConfig } from './config.js';

/** Keys and values of the tokens so far, for each layer [B, S, G, D] with room for S. */
export class KeyValueCache implements Disposable {
  #length = 0;
  readonly #layers: { keys: Tensor; values: Tensor }[];

  constructor(
    stream: Stream,
    config: DecoderConfig,
    batch: number,
    readonly capacity: number,
    dtype: FloatDType,
  ) {
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
    this.#length += tokens;
  }

  dispose(): void {
    for (const { keys, values } of this.#layers) {
      keys.dispose();
      values.dispose();
    }
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}
