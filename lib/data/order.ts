import { QLoRAError } from '../errors.js';

/**
 * 32 random bits of a seed and a counter, without state: the finalizer of MurmurHash3 over a chain of the words
 * (Appleby, public domain). Not for secrets.
 */
export function randomBits(...words: readonly number[]): number {
  let h = 0x9e3779b9;
  for (const word of words) {
    // Seeds above 32 bits count with both halves.
    h = mix(h ^ (word >>> 0));
    h = mix((h + Math.floor(word / 2 ** 32) + 0x85ebca6b) >>> 0);
  }
  return h;
}

function mix(word: number): number {
  let h = word >>> 0;
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
}

/**
 * An order of 0 to count - 1 that follows from seed and epoch alone, so that a resumed run needs nothing but its step.
 * Fisher-Yates, each choice from `randomBits(seed, epoch, index)`.
 */
export function shuffledOrder(count: number, seed: number, epoch: number): Uint32Array {
  const order = Uint32Array.from({ length: count }, (_, i) => i);
  for (let i = count - 1; i > 0; i--) {
    const j = Math.floor((randomBits(seed, epoch, i) / 2 ** 32) * (i + 1));
    const other = order[j] as number;
    order[j] = order[i] as number;
    order[i] = other;
  }
  return order;
}

export interface Split {
  /** Indices, ascending; together they are all. */
  train: Uint32Array;
  eval: Uint32Array;
}

/** No epoch has this number, so the split is not the start of an epoch's order. */
const SPLIT_STREAM = 2 ** 32 - 1;

/**
 * Splits rows off for evaluation: `size` below 1 is a share of them (at least one row), from 1 on a count; which ones
 * follows from the seed. Throws ERR_QLORA_EVAL_SPLIT where nothing would be left to train on.
 */
export function splitRows(count: number, size: number, seed: number): Split {
  const wanted = size < 1 ? Math.max(1, Math.round(count * size)) : size;
  if (!(size > 0) || !Number.isInteger(wanted) || wanted >= count) {
    throw new QLoRAError('ERR_QLORA_EVAL_SPLIT', `Of ${count} rows ${size} cannot be split off for evaluation`, {
      hint: `Give a share between 0 and 1 or a whole number below ${count}, or a data set of its own.`,
      detail: { rows: count, evalDataset: size },
    });
  }
  const order = shuffledOrder(count, seed, SPLIT_STREAM);
  return { train: order.slice(wanted).sort(), eval: order.slice(0, wanted).sort() };
}
