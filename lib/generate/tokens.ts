/** From ids to ids: the prompt at once, then a token a pass over a cache of keys and values. */
import { QLoRAError } from '../errors.js';
import { checkIds, FrozenAdapter, hiddenStates, logitsOf, type ModelCore } from '../models/core.js';
import type { DecoderPass } from '../models/decoder.js';
import { KeyValueCache } from '../models/key-value-cache.js';
import { TokenPass } from '../models/token-pass.js';
import { argmax, sample } from '../ops/logits-choose.js';
import type { Tensor } from '../tensor.js';
import { beamSearch } from './beams.js';
import { processScores, type ScoreOptions } from './scores.js';

export interface SamplingOptions extends Omit<ScoreOptions, 'minNewTokens'> {
  maxNewTokens: number;
  /** Left out: what minLength asks for. */
  minNewTokens: number | undefined;
  /** As minNewTokens, with the prompt counted. */
  minLength: number;
  /** 1 keeps one text; more search for the likeliest. */
  numBeams: number;
  /** A finished beam's score is divided by its length to this power. */
  lengthPenalty: number;
  /** When beams stop: see BeamSearch. */
  earlyStopping: boolean | 'never';
  seed: number;
  /** Whether these new ids are a whole text although none of endTokens ended it; beams ask it. */
  isWhole?: (ids: readonly number[]) => boolean;
  adapter: string | undefined;
  signal?: AbortSignal;
}

/** How every pass of a generation is made. */
export type GenerationPass = Omit<DecoderPass, 'computeDtype'>;

/** New ids, one by one; those of beams when the search is over. */
export async function* generateIds(
  core: ModelCore,
  prompt: ArrayLike<number>,
  options: SamplingOptions,
): AsyncGenerator<number, void, undefined> {
  checkIds(prompt, core.config.vocabSize);
  if (prompt.length === 0) {
    throw new QLoRAError('ERR_QLORA_ARGUMENT', 'a prompt must have at least one token, got none', {
      hint: 'A tokenizer without BOS makes nothing of an empty text.',
    });
  }
  const minNewTokens = options.minNewTokens ?? Math.max(0, options.minLength - prompt.length);
  using frozen = new FrozenAdapter(core, options.adapter);
  const pass = { adapter: options.adapter, frozen: frozen.layers, checkpointing: 'none' } as const;
  if (options.numBeams > 1) {
    yield* (await beamSearch(core, prompt, pass, { ...options, minNewTokens })).ids;
    return;
  }
  const capacity = prompt.length + options.maxNewTokens;
  using cache = new KeyValueCache(core.stream, core.config, 1, capacity, core.computeDtype);
  const ids = new Int32Array(capacity);
  ids.set(prompt);
  using passes = new Passes(core, cache, pass);
  for (let length = prompt.length; length < capacity; length++) {
    options.signal?.throwIfAborted();
    using logits = passes.logits(ids.subarray(cache.length, length));
    const step = length - prompt.length;
    const id = await nextId(logits, ids.subarray(0, length), step, { ...options, minNewTokens });
    if (options.endTokens.has(id)) return;
    yield id;
    ids[length] = id;
  }
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

/** @param ids all so far */
async function nextId(
  logits: Tensor,
  ids: Int32Array,
  step: number,
  options: SamplingOptions & ScoreOptions,
): Promise<number> {
  using scores = processScores(logits, ids, step, 1, options);
  using id = options.temperature > 0 ? sample(scores, { seed: options.seed, stream: step }) : argmax(scores);
  return (await id.readBits())[0] as number;
}
