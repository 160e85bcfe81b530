/** Passes over a cache that is read on and on. */
import { type FrozenAdapter, hiddenStates, logitsOf, type ModelCore } from '../models/core.js';
import type { DecoderPass } from '../models/decoder.js';
import type { KeyValueCache } from '../models/key-value-cache.js';
import { TokenPass } from '../models/token-pass.js';
import type { Tensor } from '../tensor.js';

/** How every pass of a generation is made. */
export type GenerationPass = Omit<DecoderPass, 'computeDtype'>;

export function passOf(adapter: string | undefined, { layers }: FrozenAdapter): GenerationPass {
  return { adapter, frozen: layers, checkpointing: 'none' };
}

/** The passes of a generation: whatever comes first, a prompt, then a token a row and pass. To be disposed of. */
export class Passes implements Disposable {
  #token: TokenPass | undefined;

  constructor(
    private readonly core: ModelCore,
    private readonly cache: KeyValueCache,
    private readonly pass: GenerationPass,
  ) {}

  /** @param tokens [B, length], new to the cache; returns the logits after the last of each row, f32 [B, V]. */
  logits(tokens: Int32Array): Tensor {
    const { core, cache, pass } = this;
    const { batch } = cache;
    if (tokens.length === batch) {
      this.#token ??= new TokenPass(core, cache, pass);
      return this.#token.run(tokens);
    }
    const length = tokens.length / batch;
    const wanted = Int32Array.from({ length: batch }, (_, b) => (b + 1) * length - 1);
    using hidden = hiddenStates(core, undefined, { tokens, batch, length, wanted }, pass, cache);
    return logitsOf(core, pass.adapter, hidden);
  }

  [Symbol.dispose](): void {
    this.#token?.[Symbol.dispose]();
  }
}
