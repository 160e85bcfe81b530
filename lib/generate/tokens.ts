/** From ids to ids: the prompt at once, then a token a pass over a cache of keys and values. */
import { QLoRAError } from '../errors.js';
import { checkIds, hiddenStates, logitsOf, type ModelCore } from '../models/core.js';
import { KeyValueCache } from '../models/key-value-cache.js';
import { sample } from '../ops/sample.js';

export interface SamplingOptions {
  maxNewTokens: number;
  /** 0 is greedy. */
  temperature: number;
  /** 0 keeps all. */
  topK: number;
  /** 1 keeps all. */
  topP: number;
  seed: number;
  /** Ids that end the text; they are not given out. */
  endTokens: ReadonlySet<number>;
  adapter: string | undefined;
  signal?: AbortSignal;
}

/** New ids, one by one. */
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
  using cache = new KeyValueCache(core.stream, core.config, 1, prompt.length + options.maxNewTokens, core.computeDtype);
  let tokens = Int32Array.from(prompt);
  for (let step = 0; step < options.maxNewTokens; step++) {
    options.signal?.throwIfAborted();
    const id = await nextId(core, tokens, cache, step, options);
    if (options.endTokens.has(id)) return;
    yield id;
    tokens = Int32Array.of(id);
  }
}

async function nextId(
  core: ModelCore,
  tokens: Int32Array,
  cache: KeyValueCache,
  step: number,
  { temperature, topK, topP, seed, adapter }: SamplingOptions,
): Promise<number> {
  const rows = { tokens, batch: 1, length: tokens.length };
  using hidden = hiddenStates(core, undefined, rows, { adapter, checkpointing: 'none' }, cache);
  using logits = logitsOf(core, adapter, hidden, Int32Array.of(tokens.length - 1));
  using id = sample(logits, { temperature, topK, topP, seed, stream: step });
  return (await id.readBits())[0] as number;
}
