/** Which rows stand in which sequence: one in each, or as many as fit. */

import { givingWay } from './give-way.js';
import { PACKING_STREAM, shuffledOrder } from './order.js';
import type { RowStore } from './row-store.js';

/** Rows by number, and the sequences that they form. */
export class Sequences {
  /** Tokens of each sequence. */
  readonly tokens: Int32Array;
  /** Targets of each. */
  readonly targets: Int32Array;

  /**
   * @param order every row once, sequence after sequence
   * @param starts where in `order` each sequence begins, and the end
   */
  constructor(
    rows: RowStore,
    private readonly order: Uint32Array,
    private readonly starts: Uint32Array,
  ) {
    this.tokens = new Int32Array(this.count);
    this.targets = new Int32Array(this.count);
    for (let i = 0, place = 0; i < this.count; i++) {
      for (; place < (starts[i + 1] as number); place++) {
        const row = order[place] as number;
        this.tokens[i] = (this.tokens[i] as number) + rows.tokens(row);
        this.targets[i] = (this.targets[i] as number) + rows.targets(row);
      }
    }
  }

  get count(): number {
    return this.starts.length - 1;
  }

  rowsOf(sequence: number): Uint32Array {
    return this.order.subarray(this.starts[sequence], this.starts[sequence + 1]);
  }
}

/** Each row is a sequence. */
export function oneRowEach(rows: RowStore): Sequences {
  const numbers = (length: number) => Uint32Array.from({ length }, (_, i) => i);
  return new Sequences(rows, numbers(rows.count), numbers(rows.count + 1));
}

/** Rows packed with one another: more fill sequences better and take longer to place. */
const windowRows = 1024;

/**
 * Packs rows into sequences of at most `maxLength` tokens: in windows of a shuffled order each row, the longest first,
 * goes to the sequence that it fills best (best fit decreasing). A longer row is a sequence of its own. It follows from
 * lengths and seed alone, so every epoch has the same sequences, in an order of its own.
 */
export async function packRows(rows: RowStore, maxLength: number, seed: number): Promise<Sequences> {
  const shuffled = shuffledOrder(rows.count, seed, PACKING_STREAM);
  const order = new Uint32Array(rows.count);
  const starts = [0];
  let filled = 0;
  const giveWay = givingWay();
  for (let begin = 0; begin < rows.count; begin += windowRows) {
    const longestFirst = shuffled.subarray(begin, begin + windowRows).sort((a, b) => rows.tokens(b) - rows.tokens(a));
    for (const sequence of bestFit(longestFirst, (row) => rows.tokens(row), maxLength)) {
      order.set(sequence, filled);
      filled += sequence.length;
      starts.push(filled);
    }
    await giveWay();
  }
  return new Sequences(rows, order, Uint32Array.from(starts));
}

function bestFit(rows: Uint32Array, tokens: (row: number) => number, maxLength: number): number[][] {
  const sequences: number[][] = [];
  const rooms: number[] = [];
  for (const row of rows) {
    const length = tokens(row);
    let best = -1;
    for (let i = 0; i < rooms.length; i++) {
      const room = rooms[i] as number;
      if (room >= length && (best < 0 || room < (rooms[best] as number))) best = i;
    }
    if (best < 0) {
      best = sequences.push([]) - 1;
      rooms.push(maxLength);
    }
    sequences[best]?.push(row);
    rooms[best] = (rooms[best] as number) - length;
  }
  return sequences;
}
