/** How often the rows of several sources come in an epoch. */
import { QLoRAError } from '../errors.js';
import { shuffledOrder } from './order.js';

/** More rows than this in an epoch are a mistake in the weights. */
const mostRows = 2 ** 30;
/** No epoch has these numbers. */
const mixStream = 2 ** 31;

/** Rows `start` to `end` of all, of which each comes `weight` times as often as one of a source of weight 1. */
export interface MixedPart {
  start: number;
  end: number;
  weight: number;
}

/**
 * The rows of an epoch. A weight is how often each row of a source comes against each row of the others: those of the
 * smallest weight come once, those of twice that weight twice. Where that is no whole number, as 2.5, a seeded choice
 * of the source's rows, here half of them, comes once more.
 *
 * @param rows numbers of the rows that are to be trained, ascending
 */
export function mixRows(rows: Uint32Array, parts: readonly MixedPart[], seed: number): Uint32Array {
  const own = parts.map(({ start, end }) => rows.filter((row) => row >= start && row < end));
  const used = parts.filter((_, i) => (own[i] as Uint32Array).length > 0);
  const smallest = Math.min(...used.map(({ weight }) => weight));
  if (used.every(({ weight }) => weight === smallest)) return rows;
  const counts = own.map((part, i) => Math.round((part.length * (parts[i] as MixedPart).weight) / smallest));
  const total = counts.reduce((sum, count) => sum + count, 0);
  if (total > mostRows) {
    throw new QLoRAError(
      'ERR_QLORA_OPTION_INVALID',
      `QLoRATrainer: the weights of dataset make an epoch of ${total} rows, at most ${mostRows} are possible`,
      { hint: 'A weight is how often each row comes, against the rows of the other sources: bring them nearer to 1.' },
    );
  }
  const mixed = new Uint32Array(total);
  let at = 0;
  own.forEach((part, i) => {
    let left = counts[i] as number;
    for (; left >= part.length && part.length > 0; left -= part.length) {
      mixed.set(part, at);
      at += part.length;
    }
    const chosen = shuffledOrder(part.length, seed, mixStream + i)
      .slice(0, left)
      .sort();
    mixed.set(
      chosen.map((k) => part[k] as number),
      at,
    );
    at += left;
  });
  return mixed;
}
