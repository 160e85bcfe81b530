/** Logits as the options want them before a token is chosen, in the order of transformers' processors. */
import { constrainLogits, warpLogits } from '../ops/logits-process.js';
import { Tensor } from '../tensor.js';

export interface ScoreOptions {
  /** 1 changes nothing. */
  repetitionPenalty: number;
  /** 0 forbids nothing. */
  noRepeatNgramSize: number;
  /** Tokens before which none of endTokens is chosen. */
  minNewTokens: number;
  /** 0 is greedy: this and what follows changes nothing. */
  temperature: number;
  /** 0 keeps all. */
  topK: number;
  /** 1 keeps all. */
  topP: number;
  /** 1 keeps all. */
  typicalP: number;
  /** Ids that end the text; they are not given out. */
  endTokens: ReadonlySet<number>;
}

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

/**
 * @param logits f32 [B, V]
 * @param seen the ids of each row so far, prompts and all, [B, length] row-major
 * @param made how many of them are new
 * @param keep how many candidates sampling has to leave at least
 * @returns f32 [B, V]; `logits` itself where nothing changes it
 */
export function processScores(
  logits: Tensor,
  seen: Int32Array,
  made: number,
  keep: number,
  { repetitionPenalty, noRepeatNgramSize, minNewTokens, temperature, topK, topP, typicalP, endTokens }: ScoreOptions,
): Tensor {
  const { stream } = logits;
  const seenLength = seen.length / logits.dim(0);
  const looksBack = repetitionPenalty !== 1 || noRepeatNgramSize > 0;
  using seenIds = looksBack ? Tensor.from(stream, seen, [logits.dim(0), seenLength]) : undefined;
  const mayNotEnd = made < minNewTokens && endTokens.size > 0;
  using forbidden = mayNotEnd ? Tensor.from(stream, Int32Array.from(endTokens), [endTokens.size]) : undefined;
  let scores = logits;
  if (seenIds || forbidden) {
    scores = constrainLogits(logits, { seen: seenIds, seenLength, repetitionPenalty, noRepeatNgramSize, forbidden });
  }
  const samples = temperature > 0 && (temperature !== 1 || topK > 0 || topP < 1 || typicalP < 1);
  if (!samples) return scores;
  const warped = warpLogits(scores, { temperature, topK, topP, typicalP, keep });
  if (scores !== logits) scores.dispose();
  return warped;
}
