/** From ids to ids: prompts at once, then a token a row and pass over a cache of keys and values. */
import { QLoRAError } from '../errors.js';
import { checkIds, FrozenAdapter, hiddenStates, type ModelCore } from '../models/core.js';
import { KeyValueCache } from '../models/key-value-cache.js';
import { argmax, sample } from '../ops/logits-choose.js';
import type { Tensor } from '../tensor.js';
import { beamSearch } from './beams.js';
import { type GenerationPass, Passes, passOf } from './passes.js';
import { processScores, type SamplingOptions, type ScoreOptions } from './scores.js';

/** New ids, one by one; those of beams when the search is over. */
export async function* generateIds(
  core: ModelCore,
  prompt: ArrayLike<number>,
  options: SamplingOptions,
): AsyncGenerator<number, void, undefined> {
  if (options.numBeams === 1) {
    for await (const [id] of generateRows(core, [prompt], options)) yield id as number;
    return;
  }
  checkPrompt(core, prompt);
  using frozen = new FrozenAdapter(core, options.adapter);
  const minNewTokens = options.minNewTokens ?? Math.max(0, options.minLength - prompt.length);
  yield* (await beamSearch(core, prompt, passOf(options.adapter, frozen), { ...options, minNewTokens })).ids;
}

export interface RowOptions extends Omit<SamplingOptions, 'numBeams' | 'lengthPenalty' | 'earlyStopping' | 'isWhole'> {
  /** Whether enough of this row was made; asked after each token. */
  isOver?: (row: number) => boolean;
}

/**
 * One text a prompt, all of them a token further with each pass, which reads the weights once: the new id of each row,
 * undefined where it has ended. minLength counts the longest prompt, as transformers counts a padded batch.
 */
export async function* generateRows(
  core: ModelCore,
  prompts: readonly ArrayLike<number>[],
  options: RowOptions,
): AsyncGenerator<readonly (number | undefined)[], void, undefined> {
  for (const prompt of prompts) checkPrompt(core, prompt);
  const longest = Math.max(...prompts.map((prompt) => prompt.length));
  const minNewTokens = options.minNewTokens ?? Math.max(0, options.minLength - longest);
  using frozen = new FrozenAdapter(core, options.adapter);
  const pass = passOf(options.adapter, frozen);
  const batch = prompts.length;
  const capacity = longest + options.maxNewTokens;
  using cache = new KeyValueCache(core.stream, core.config, batch, capacity, core.computeDtype);
  using passes = new Passes(core, cache, pass);
  const seen = new SeenIds(prompts, longest, options.maxNewTokens);
  const going = new Set(prompts.keys());
  let tokens = beforeFirstLogits(core, prompts, cache, pass);
  for (let step = 0; step < options.maxNewTokens; step++) {
    options.signal?.throwIfAborted();
    using logits = passes.logits(tokens);
    tokens = await chooseIds(logits, seen.before(step), step, { ...options, minNewTokens });
    for (const row of going) if (options.endTokens.has(tokens[row] as number)) going.delete(row);
    if (going.size === 0) return;
    yield Array.from(tokens, (id, row) => (going.has(row) ? id : undefined));
    for (const row of going) if (options.isOver?.(row)) going.delete(row);
    if (going.size === 0) return;
    seen.add(step, tokens);
  }
}

function checkPrompt(core: ModelCore, prompt: ArrayLike<number>): void {
  checkIds(prompt, core.config.vocabSize);
  if (prompt.length > 0) return;
  throw new QLoRAError('ERR_QLORA_ARGUMENT', 'a prompt must have at least one token, got none', {
    hint: 'A tokenizer without BOS makes nothing of an empty text.',
  });
}

/**
 * Ids whose pass gives the first logits: one prompt itself. Several are of different length: the cache gets all but the
 * last of each, one prompt after the other, and the last ones are returned.
 */
function beforeFirstLogits(
  core: ModelCore,
  prompts: readonly ArrayLike<number>[],
  cache: KeyValueCache,
  pass: GenerationPass,
): Int32Array {
  const [first] = prompts;
  if (prompts.length === 1 && first) return Int32Array.from(first);
  prompts.forEach((prompt, row) => {
    const length = prompt.length - 1;
    if (length === 0) return;
    using own = new KeyValueCache(core.stream, core.config, 1, length, core.computeDtype);
    const tokens = Int32Array.from({ length }, (_, i) => prompt[i] as number);
    const wanted = Int32Array.of(length - 1);
    hiddenStates(core, undefined, { tokens, batch: 1, length, wanted }, pass, own).dispose();
    cache.gather(own, new Int32Array(prompts.length).fill(-1).fill(0, row, row + 1), 0);
  });
  return Int32Array.from(prompts, (prompt) => prompt[prompt.length - 1] as number);
}

/** The ids of each row so far, those of a shorter prompt behind a beginning of -1. */
class SeenIds {
  readonly #capacity: number;
  readonly #ids: Int32Array;

  constructor(
    private readonly prompts: readonly ArrayLike<number>[],
    private readonly longest: number,
    maxNewTokens: number,
  ) {
    this.#capacity = longest + maxNewTokens;
    this.#ids = new Int32Array(prompts.length * this.#capacity).fill(-1);
    prompts.forEach((prompt, row) => {
      this.#ids.set(prompt, row * this.#capacity + longest - prompt.length);
    });
  }

  /** [B, longest + step], before the token of this step. */
  before(step: number): Int32Array {
    const length = this.longest + step;
    const rows = this.prompts.map((_, row) => this.#ids.subarray(row * this.#capacity, row * this.#capacity + length));
    if (rows.length === 1) return rows[0] as Int32Array;
    const all = new Int32Array(rows.length * length);
    rows.forEach((row, b) => {
      all.set(row, b * length);
    });
    return all;
  }

  add(step: number, ids: Int32Array): void {
    ids.forEach((id, row) => {
      this.#ids[row * this.#capacity + this.longest + step] = id;
    });
  }
}

/** @param seen all ids so far, [B, length]; returns the next of each row */
async function chooseIds(
  logits: Tensor,
  seen: Int32Array,
  step: number,
  options: RowOptions & ScoreOptions,
): Promise<Int32Array> {
  using scores = processScores(logits, seen, step, 1, options);
  using ids = options.temperature > 0 ? sample(scores, { seed: options.seed, stream: step }) : argmax(scores);
  return (await ids.readBits()) as Int32Array;
}
