/** What the data is like, looked at before training starts. */
import { setImmediate } from 'node:timers/promises';
import { thousands } from '../format.js';
import { log } from '../logger.js';
import type { EncodedSource } from './encode-source.js';

/** A row by its number in its source, from 1. */
export interface RowNumber {
  source: string;
  row: number;
}

export interface PreflightSource {
  name: string;
  /** Rows that are used, and that the source has; `total` is undefined where that was not counted. */
  used: number;
  total: number | undefined;
  tokens: number;
  /** How often each row comes, against those of the other sources. */
  weight: number;
}

export interface Preflight {
  /** Of all sources together, each row once; rows that are split off for evaluation included. */
  rows: number;
  tokens: number;
  /** Tokens whose prediction is trained. */
  targetTokens: number;
  /** Rows that were too long and lost tokens, what share of all rows they are, and how many tokens were lost. */
  truncatedRows: number;
  truncatedShare: number;
  truncatedTokens: number;
  /** Rows that are equal to an earlier one, and the first of them. */
  duplicates: { count: number; rows: (RowNumber & { sameAs: RowNumber })[] };
  /** Rows whose answer is blank, so that they teach only to end, and the first of them. */
  emptyTargets: { count: number; rows: RowNumber[] };
  /** The rows of most tokens, longest first. */
  longest: (RowNumber & { tokens: number })[];
  sources: PreflightSource[];
  /** Rows that are trained on, and that were split off for evaluation; undefined where none were. */
  split?: { train: number; eval: number };
}

const mostNamed = 10;
const mostLongest = 5;
/** Rows between two turns of the event loop. */
const slice = 20_000;

/** Looks at encoded rows once. Needs 4 bytes a row to find duplicates. */
export async function preflight(parts: readonly (EncodedSource & { weight: number })[]): Promise<Preflight> {
  const result: Preflight = {
    rows: 0,
    tokens: 0,
    targetTokens: 0,
    truncatedRows: 0,
    truncatedShare: 0,
    truncatedTokens: 0,
    duplicates: { count: 0, rows: [] },
    emptyTargets: { count: 0, rows: [] },
    longest: [],
    sources: [],
  };
  const firsts = new FirstRows(parts);
  for (const [p, { name, rows, total, weight }] of parts.entries()) {
    const source: PreflightSource = { name, used: rows.count, total, tokens: 0, weight };
    result.sources.push(source);
    for (let i = 0; i < rows.count; i++) {
      const at = { source: name, row: i + 1 };
      const tokens = rows.tokens(i);
      source.tokens += tokens;
      result.targetTokens += rows.targets(i);
      if (rows.truncated(i) > 0) result.truncatedRows++;
      result.truncatedTokens += rows.truncated(i);
      if (rows.saysNothing(i) && result.emptyTargets.count++ < mostNamed) result.emptyTargets.rows.push(at);
      const first = firsts.firstLike(p, i);
      if (first && result.duplicates.count++ < mostNamed) result.duplicates.rows.push({ ...at, sameAs: first });
      addLongest(result.longest, { ...at, tokens });
      if (i % slice === slice - 1) await setImmediate();
    }
    result.rows += rows.count;
    result.tokens += source.tokens;
  }
  result.truncatedShare = result.rows === 0 ? 0 : result.truncatedRows / result.rows;
  return result;
}

function addLongest(longest: Preflight['longest'], row: Preflight['longest'][number]): void {
  if (longest.length === mostLongest && row.tokens <= (longest.at(-1)?.tokens ?? 0)) return;
  const place = longest.findIndex(({ tokens }) => tokens < row.tokens);
  longest.splice(place < 0 ? longest.length : place, 0, row);
  longest.length = Math.min(longest.length, mostLongest);
}

/** The first row of each hash: an open hash table of row numbers. */
class FirstRows {
  readonly #parts: readonly EncodedSource[];
  readonly #starts: number[] = [];
  /** Row numbers over all parts, from 1; 0 is free. */
  readonly #slots: Uint32Array;

  constructor(parts: readonly EncodedSource[]) {
    this.#parts = parts;
    let count = 0;
    for (const { rows } of parts) {
      this.#starts.push(count);
      count += rows.count;
    }
    this.#slots = new Uint32Array(2 ** Math.ceil(Math.log2(2 * count + 2)));
  }

  /** An earlier row that is the same as row `i` of part `p`; where there is none, this is the first. */
  firstLike(p: number, i: number): RowNumber | undefined {
    const [low, high] = (this.#parts[p] as EncodedSource).rows.hash(i);
    const mask = this.#slots.length - 1;
    for (let slot = low & mask; ; slot = (slot + 1) & mask) {
      const found = this.#slots[slot] as number;
      if (found === 0) {
        this.#slots[slot] = (this.#starts[p] as number) + i + 1;
        return undefined;
      }
      const q = this.#starts.findLastIndex((start) => start < found);
      const { name, rows } = this.#parts[q] as EncodedSource;
      const row = found - (this.#starts[q] as number);
      const [otherLow, otherHigh] = rows.hash(row - 1);
      if (otherLow === low && otherHigh === high) return { source: name, row };
    }
  }
}

/** 'using 1,000 of 75,000 rows of X', where the total is known. */
export function usingRows({ name, used, total }: Pick<PreflightSource, 'name' | 'used' | 'total'>): string {
  return `using ${thousands(used)}${total === undefined ? '' : ` of ${thousands(total)}`} rows of ${name}`;
}

/** '54 rows to train on, 6 set apart for evaluation'. */
export function splitSentence({ train, eval: apart }: NonNullable<Preflight['split']>): string {
  return `${thousands(train)} rows to train on, ${thousands(apart)} set apart for evaluation`;
}

export function logPreflight(result: Preflight): void {
  const { rows, tokens, targetTokens, truncatedRows, truncatedShare, duplicates, emptyTargets, longest } = result;
  const share = (x: number): string => `${(100 * x).toFixed(1)}%`;
  const parts = [
    `${thousands(rows)} rows`,
    `${thousands(tokens)} tokens, ${thousands(targetTokens)} of them trained (${share(targetTokens / Math.max(tokens, 1))})`,
    `${thousands(truncatedRows)} rows cut (${share(truncatedShare)})`,
    `${thousands(duplicates.count)} duplicates`,
    `the longest row has ${thousands(longest[0]?.tokens ?? 0)} tokens`,
  ];
  log('info', `preflight: ${parts.join('; ')}`, result);
  if (duplicates.count > 0) {
    const list = duplicates.rows.map(({ row, sameAs }) => `${row} (as ${sameAs.row})`).join(', ');
    log(
      'warn',
      `${thousands(duplicates.count)} rows are equal to earlier ones: ${list}${rest(duplicates)}`,
      duplicates,
    );
  }
  if (emptyTargets.count > 0) {
    const list = emptyTargets.rows.map(({ row }) => row).join(', ');
    log(
      'warn',
      `${thousands(emptyTargets.count)} rows have a blank answer: ${list}${rest(emptyTargets)}`,
      emptyTargets,
    );
  }
}

function rest({ count, rows }: { count: number; rows: readonly unknown[] }): string {
  return count > rows.length ? `, and ${thousands(count - rows.length)} more` : '';
}
