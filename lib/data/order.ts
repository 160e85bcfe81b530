import { QLoRAError } from '../errors.js';
import { givingWay } from './give-way.js';

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

/** No epoch has this number: the order in which rows are packed into sequences. */
export const PACKING_STREAM = 2 ** 32 - 2;

/** Steps whose items are sorted together, at most: among more, an epoch would be a march from long to short. */
const stretchSteps = 50;

/**
 * An order of an epoch in which each step has items of like length, as Hugging Face's LengthGroupedSampler makes it, at
 * the size of a step: shuffled, cut into stretches of count / (4 size) steps (at least 1, at most 50), and each stretch
 * sorted, the longest first. The longest of all is in the first step, so that what does not fit in memory shows at once.
 * It follows from lengths, seed and epoch alone.
 *
 * @param size items a step
 */
export async function lengthGroupedOrder(
  lengths: Int32Array,
  size: number,
  seed: number,
  epoch: number,
): Promise<Uint32Array> {
  const count = lengths.length;
  const order = shuffledOrder(count, seed, epoch);
  const lengthAt = (place: number) => lengths[order[place] as number] as number;
  let longest = 0;
  for (let place = 1; place < count; place++) if (lengthAt(place) > lengthAt(longest)) longest = place;
  if (count > 0) [order[0], order[longest]] = [order[longest] as number, order[0] as number];
  const stretch = Math.max(1, Math.min(Math.floor(count / (size * 4)), stretchSteps)) * size;
  const giveWay = givingWay();
  for (let begin = 0; begin < count; begin += stretch) {
    order.subarray(begin, begin + stretch).sort((a, b) => (lengths[b] as number) - (lengths[a] as number));
    await giveWay();
  }
  return order;
}
