/** Encoded rows by number, wherever they lie: in memory, or in a file where they are more than memory holds. */
import { type EncodedRow, IGNORED } from './encoded-row.js';

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

/** The rows of several stores, one store after the other. */
export class ConcatenatedRows implements RowStore {
  readonly count: number;
  readonly #stores: readonly RowStore[];
  /** Where each store begins. */
  readonly #starts: readonly number[];

  constructor(stores: readonly RowStore[]) {
    let count = 0;
    this.#stores = stores;
    this.#starts = stores.map((store) => {
      count += store.count;
      return count - store.count;
    });
    this.count = count;
  }

  #at(i: number): [RowStore, number] {
    const s = this.#starts.findLastIndex((start, k) => start <= i && (this.#stores[k] as RowStore).count > 0);
    return [this.#stores[s] as RowStore, i - (this.#starts[s] as number)];
  }

  tokens(i: number): number {
    const [store, row] = this.#at(i);
    return store.tokens(row);
  }

  targets(i: number): number {
    const [store, row] = this.#at(i);
    return store.targets(row);
  }

  async rows(indices: ArrayLike<number>): Promise<EncodedRow[]> {
    const parts = Array.from(indices, (i) => {
      const [store, row] = this.#at(i);
      return store.rows([row]);
    });
    return (await Promise.all(parts)).flat();
  }
}

/** Some rows of a store, in another order or several times. */
export class SelectedRows implements RowStore {
  readonly #store: RowStore;
  readonly #indices: Uint32Array;

  constructor(store: RowStore, indices: Uint32Array) {
    this.#store = store;
    this.#indices = indices;
  }

  get count(): number {
    return this.#indices.length;
  }

  tokens(i: number): number {
    return this.#store.tokens(this.#indices[i] as number);
  }

  targets(i: number): number {
    return this.#store.targets(this.#indices[i] as number);
  }

  rows(indices: ArrayLike<number>): Promise<EncodedRow[]> {
    return this.#store.rows(Array.from(indices, (i) => this.#indices[i] as number));
  }
}
