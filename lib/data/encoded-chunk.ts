/** Encoded rows side by side in two arrays, which go from thread to thread and to a file as they are. */
import { createHash } from 'node:crypto';
import type { Tokenizer } from '../tokenizer/tokenizer.js';
import { type EncodedRow, type EncodeOptions, encodeAny, IGNORED, whyNoTargets } from './encode.js';
import { targetsOf } from './row-store.js';
import type { LocatedRow, Row } from './rows.js';

/** What is known of each row, in the order of its entries in an index. */
export const column = {
  tokens: 0,
  targets: 1,
  truncated: 2,
  cutSource: 3,
  cutTarget: 4,
  hashLow: 5,
  hashHigh: 6,
  flags: 7,
} as const;
export const columns = 8;

/** Labels are kept as they are; else as a bit a token, since a label is its token's id or -100. */
const ownLabels = 1;
/** An answer is there but says nothing. */
export const saysNothing = 2;

export interface EncodedChunk {
  /** Of each row its ids, then its labels. */
  words: Int32Array;
  /** `columns` numbers a row. */
  index: Int32Array;
  /** Rows of the chunk with nothing to train, and why. */
  untrained: { row: number; why: string }[];
}

/** How many words a row takes. */
export function wordsOf(tokens: number, flags: number): number {
  return tokens + (flags & ownLabels ? tokens : Math.ceil(tokens / 32));
}

export class ChunkBuilder {
  readonly #words: Int32Array[] = [];
  readonly #index: number[] = [];
  readonly #untrained: EncodedChunk['untrained'] = [];

  /** Encodes one row more. Throws what `encodeAny` throws. */
  add({ row, place }: LocatedRow, tokenizer: Tokenizer | undefined, options: EncodeOptions): void {
    const encoded = encodeAny(row, tokenizer, options, place);
    const { ids, labels, truncated, cut } = encoded;
    const why = whyNoTargets(row, encoded);
    if (why !== undefined) this.#untrained.push({ row: this.#index.length / columns, why });
    const own = labels.some((label, t) => label !== IGNORED && label !== ids[t]);
    const flags = (own ? ownLabels : 0) | (isSilent(row) ? saysNothing : 0);
    const hash = createHash('sha256').update(JSON.stringify(row, plainIds)).digest();
    this.#index.push(ids.length, targetsOf(encoded), truncated, cut.source, cut.target);
    this.#index.push(hash.readInt32LE(0), hash.readInt32LE(4), flags);
    this.#words.push(ids, own ? labels : bitsOf(labels));
  }

  take(): EncodedChunk {
    const words = new Int32Array(this.#words.reduce((n, part) => n + part.length, 0));
    let at = 0;
    for (const part of this.#words) {
      words.set(part, at);
      at += part.length;
    }
    return { words, index: Int32Array.from(this.#index), untrained: this.#untrained };
  }
}

function plainIds(_: string, value: unknown): unknown {
  return ArrayBuffer.isView(value) ? Array.from(value as unknown as ArrayLike<number>) : value;
}

/** Whether what the row is to teach is blank. */
function isSilent(row: Row): boolean {
  if ('inputIds' in row) return false;
  if ('text' in row) return row.text.trim() === '';
  if ('prompt' in row) return row.completion.trim() === '';
  if ('instruction' in row) return row.output.trim() === '';
  const said = row.messages.filter(({ role }) => role === 'assistant');
  return said.every(({ content, tool_calls }) => content.trim() === '' && tool_calls === undefined);
}

function bitsOf(labels: Int32Array): Int32Array {
  const bits = new Int32Array(Math.ceil(labels.length / 32));
  for (let t = 0; t < labels.length; t++) {
    if (labels[t] !== IGNORED) bits[t >> 5] = (bits[t >> 5] as number) | (1 << (t & 31));
  }
  return bits;
}

/** The row whose words and entries of the index these are. */
export function unpackRow(words: Int32Array, entry: Int32Array): EncodedRow {
  const [tokens = 0, , truncated = 0, source = 0, target = 0] = entry;
  const ids = words.slice(0, tokens);
  const rest = words.subarray(tokens);
  const flags = entry[column.flags] as number;
  const labels =
    flags & ownLabels
      ? rest.slice(0, tokens)
      : ids.map((id, t) => (((rest[t >> 5] as number) >>> (t & 31)) & 1 ? id : IGNORED));
  return { ids, labels, truncated, cut: { source, target } };
}
