import { type Recording, Tensor } from '../tensor.js';
import { checkAdapter, decoderOf, logitsOf, type ModelCore } from './core.js';
import { type DecoderPass, decode } from './decoder.js';
import type { KeyValueCache } from './key-value-cache.js';
import { RopeInput } from './rope-input.js';

/**
 * A pass of one token a row over a cache: recorded once, so that each token costs one call in place of some hundreds. To
 * be disposed of.
 */
export class TokenPass implements Disposable {
  readonly #tokens: Tensor;
  readonly #rope: RopeInput;
  readonly #logits: Tensor;
  readonly #recording: Recording;

  constructor(
    private readonly core: ModelCore,
    private readonly cache: KeyValueCache,
    private readonly pass: Omit<DecoderPass, 'computeDtype'>,
  ) {
    const { stream, config, computeDtype } = core;
    const { batch } = cache;
    checkAdapter(core, pass.adapter);
    this.#tokens = new Tensor(stream, 'i32', [batch, 1]);
    this.#rope = new RopeInput(stream, config.rope, batch);
    const input = { tokens: this.#tokens, rope: this.#rope, cache };
    let logits: Tensor | undefined;
    this.#recording = stream.record(() => {
      using hidden = decode(undefined, config, decoderOf(core, pass.adapter), input, { ...pass, computeDtype });
      logits = logitsOf(core, pass.adapter, hidden);
    });
    this.#logits = logits as unknown as Tensor;
  }

  /** @param tokens the next id of each row; returns the logits after it, f32 [B, V], which the next run overwrites. */
  run(tokens: Int32Array): Tensor {
    const { core, cache } = this;
    checkAdapter(core, this.pass.adapter);
    this.#tokens.write(tokens).catch(() => {}); // who reads them fails with it
    this.#rope.write(cache.lengths, 1);
    this.#recording.run();
    cache.advance(1);
    return this.#logits.view(this.#logits.shape);
  }

  [Symbol.dispose](): void {
    this.#recording[Symbol.dispose]();
    this.#tokens.dispose();
    this.#rope[Symbol.dispose]();
    this.#logits.dispose();
  }
}
