/** Beam search: several texts grow side by side, each token sharing one pass, and the best whole one is given. */
import { QLoRAError } from '../errors.js';
import type { ModelCore } from '../models/core.js';
import { KeyValueCache } from '../models/key-value-cache.js';
import { beamCandidates } from '../ops/logits-choose.js';
import { logSoftmax } from '../ops/logits-process.js';
import { Tensor } from '../tensor.js';
import { type GenerationPass, Passes } from './passes.js';
import { processScores, type SamplingOptions, type ScoreOptions } from './scores.js';

export interface Hypothesis {
  /** New ids, without the one that ended it. */
  readonly ids: readonly number[];
  /** Sum of the log-probabilities of its tokens, over its length ** lengthPenalty once it is whole. */
  readonly score: number;
}

/** A beam with one token more. */
export interface Continuation {
  readonly beam: number;
  readonly id: number;
  readonly score: number;
}

export interface SearchOptions {
  numBeams: number;
  maxNewTokens: number;
  lengthPenalty: number;
  /**
   * true stops as soon as numBeams are whole. false, transformers' default, also where the best that grows would not be
   * better than the worst whole one if it ended now; 'never' where it would not be at its longest.
   */
  earlyStopping: boolean | 'never';
  endTokens: ReadonlySet<number>;
  isWhole?: (ids: readonly number[]) => boolean;
}

/** The search without the model: which beams grow, which are whole, when it is over. As transformers 5 decides it. */
export class BeamSearch {
  /** Best first; at first the empty one. */
  growing: readonly Hypothesis[] = [{ ids: [], score: 0 }];
  /** Best first, at most numBeams. */
  whole: readonly Hypothesis[] = [];
  done = false;
  readonly #options: SearchOptions;

  constructor(options: SearchOptions) {
    this.#options = options;
  }

  /**
   * @param continuations of the beams that grow, in the order in which they were chosen; with at least numBeams that do
   *   not end, where there are so many
   * @returns which beam each of the new ones goes on
   */
  advance(continuations: readonly Continuation[]): number[] {
    const { numBeams, maxNewTokens, lengthPenalty, earlyStopping, endTokens, isWhole } = this.#options;
    const length = (this.growing[0] as Hypothesis).ids.length + 1;
    const divisor = Math.fround(length ** lengthPenalty);
    const next = continuations.map(({ beam, id, score }) => {
      const before = (this.growing[beam] as Hypothesis).ids;
      const ids = [...before, id];
      const atEnd = endTokens.has(id);
      const ends = atEnd || length >= maxNewTokens || (isWhole?.(ids) ?? false);
      return { beam, ids, whole: atEnd ? before : ids, score, ends };
    });
    // What is not among the best numBeams is there to go on with, not to be chosen.
    const ended = next.slice(0, numBeams).filter(({ ends }) => ends);
    const scored = ended.map(({ whole, score }) => ({ ids: whole, score: Math.fround(score / divisor) }));
    this.whole = [...this.whole, ...scored].sort(byScore).slice(0, numBeams);
    const growing = next.filter(({ ends }) => !ends);
    const kept = growing.sort(byScore).slice(0, numBeams);
    this.growing = kept;
    const full = this.whole.length === numBeams;
    this.done = kept.length === 0 || (full && (earlyStopping === true || !this.#canImprove(length)));
    return kept.map(({ beam }) => beam);
  }

  get best(): Hypothesis {
    const [best] = this.whole;
    if (best) return best;
    throw new QLoRAError('ERR_QLORA_NO_TOKEN_LEFT', 'no beam could be finished: every continuation is forbidden', {
      hint: 'Lower noRepeatNgramSize, minNewTokens or maxNewTokens.',
    });
  }

  #canImprove(length: number): boolean {
    const { earlyStopping, lengthPenalty, maxNewTokens } = this.#options;
    const atLength = earlyStopping === 'never' && lengthPenalty > 0 ? maxNewTokens : length;
    const possible = Math.fround((this.growing[0] as Hypothesis).score / Math.fround(atLength ** lengthPenalty));
    return possible > (this.whole.at(-1) as Hypothesis).score;
  }
}

function byScore(a: Hypothesis, b: Hypothesis): number {
  return b.score - a.score;
}

/** The best text that numBeams beams find; with a temperature above 0 continuations are drawn without replacement. */
export async function beamSearch(
  core: ModelCore,
  prompt: ArrayLike<number>,
  pass: GenerationPass,
  options: SamplingOptions & ScoreOptions,
): Promise<Hypothesis> {
  const { numBeams, maxNewTokens, signal } = options;
  const { stream, config, computeDtype } = core;
  const search = new BeamSearch(options);
  // Keeps of a step's tokens the prompt, once, and what each beam made of it.
  using cache = new KeyValueCache(stream, config, numBeams, prompt.length + maxNewTokens, computeDtype);
  {
    signal?.throwIfAborted();
    using promptCache = new KeyValueCache(stream, config, 1, prompt.length, computeDtype);
    using passes = new Passes(core, promptCache, pass);
    using logits = passes.logits(Int32Array.from(prompt));
    const beams = await step(logits, prompt, search, options);
    cache.gather(promptCache, padded(beams, numBeams), 0);
  }
  using passes = new Passes(core, cache, pass);
  while (!search.done) {
    signal?.throwIfAborted();
    const last = search.growing.map(({ ids }) => ids.at(-1) as number);
    using logits = passes.logits(padded(last, numBeams));
    const beams = await step(logits, prompt, search, options);
    cache.gather(cache, padded(beams, numBeams), prompt.length);
  }
  return search.best;
}

/** Where beams died out, the cache keeps its rows: they repeat the first, and never win. */
function padded(values: readonly number[], length: number): Int32Array {
  return Int32Array.from({ length }, (_, i) => values[i] ?? values[0] ?? 0);
}

/** One token more for each row of the logits [B, V]; which row each of the new beams goes on. */
async function step(
  logits: Tensor,
  prompt: ArrayLike<number>,
  search: BeamSearch,
  options: SamplingOptions & ScoreOptions,
): Promise<number[]> {
  const { numBeams, endTokens, temperature, seed } = options;
  const [batch, vocabSize] = logits.shape as [number, number];
  using logProbs = logSoftmax(logits);
  const made = (search.growing[0] as Hypothesis).ids.length;
  const seen = seenBy(search.growing, batch, prompt);
  using scores = processScores(logProbs, seen, made, Math.max(2, endTokens.size + 1), options);
  const running = Float32Array.from({ length: batch }, (_, b) => search.growing[b]?.score ?? Number.NEGATIVE_INFINITY);
  using runningScores = Tensor.from(logits.stream, running, [batch]);
  // So many that numBeams go on even if every beam could end in every way.
  const count = Math.max(2, endTokens.size + 1) * numBeams;
  const noise = temperature > 0 ? 1 : 0;
  const chosen = beamCandidates(scores, runningScores, { count, noise, seed, stream: made });
  using places = chosen.places;
  using chosenScores = chosen.scores;
  const [at, score] = await Promise.all([places.readBits(), chosenScores.read()]);
  const continuations = Array.from(score, (s, i) => {
    const place = at[i] as number;
    return { beam: Math.floor(place / vocabSize), id: place % vocabSize, score: s };
  });
  return search.advance(continuations.filter((c) => c.score > Number.NEGATIVE_INFINITY));
}

function seenBy(growing: readonly Hypothesis[], batch: number, prompt: ArrayLike<number>): Int32Array {
  const length = prompt.length + (growing[0] as Hypothesis).ids.length;
  const seen = new Int32Array(batch * length);
  for (let b = 0; b < batch; b++) {
    seen.set(prompt, b * length);
    seen.set((growing[b] ?? (growing[0] as Hypothesis)).ids, b * length + prompt.length);
  }
  return seen;
}
