/** Encoded rows by number, wherever they lie: in memory, or in a file where they are more than memory holds. */
import { type EncodedRow, IGNORED } from './encode.js';

export interface RowStore {
  readonly count: number;
  /** Tokens of row i, known without reading it. */
  tokens(i: number): number;
  /** Labels of row i that its loss counts, known without reading it. */
  targets(i: number): number;
  /** These rows, in this order. */
  rows(indices: ArrayLike<number>): Promise<EncodedRow[]>;
}

/** Labels that a row's loss counts: all but the first, which nothing predicts. */
export function targetsOf(row: Pick<EncodedRow, 'labels'>): number {
  let n = 0;
  for (let t = 1; t < row.labels.length; t++) if (row.labels[t] !== IGNORED) n++;
  return n;
}

export class MemoryRows implements RowStore {
  readonly #rows: readonly EncodedRow[];
  readonly #targets: Int32Array;

  constructor(rows: readonly EncodedRow[]) {
    this.#rows = rows;
    this.#targets = Int32Array.from(rows, targetsOf);
  }

  get count(): number {
    return this.#rows.length;
  }

  tokens(i: number): number {
    return (this.#rows[i] as EncodedRow).ids.length;
  }

  targets(i: number): number {
    return this.#targets[i] as number;
  }

  async rows(indices: ArrayLike<number>): Promise<EncodedRow[]> {
    return Array.from(indices, (i) => this.#rows[i] as EncodedRow);
  }
}
