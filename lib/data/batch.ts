import type { EncodedRow } from './encode.js';
import { IGNORED } from './encode.js';

/** The segment of padding; rows of a sequence are segments 0, 1, ... */
const PADDING_SEGMENT = -1;

/** Rows that stand one after the other in one sequence; without packing a single one. */
export type Sequence = readonly Pick<EncodedRow, 'ids' | 'labels'>[];

/** Sequences side by side, [batch, length] row-major, shorter ones padded on the right. */
export interface Batch {
  batch: number;
  length: number;
  tokens: Int32Array;
  /** Aligned with `tokens`: labels[t] is tokens[t] or -100. `shiftLabels` gives what position t is to predict. */
  labels: Int32Array;
  /** From 0 in each row of a sequence; 0 in padding. */
  positions: Int32Array;
  /** Attention stays within a segment. Padding is known by its segment, never by its id: EOS may serve as padding. */
  segmentIds: Int32Array;
}

export interface CollateOptions {
  /** What stands in padding, any id of the vocabulary. Default 0. */
  padId?: number;
}

/** Tokens of a sequence. */
export function lengthOf(sequence: Sequence): number {
  return sequence.reduce((n, row) => n + row.ids.length, 0);
}

export function collate(sequences: readonly Sequence[], { padId = 0 }: CollateOptions = {}): Batch {
  const batch = sequences.length;
  const length = sequences.reduce((longest, sequence) => Math.max(longest, lengthOf(sequence)), 0);
  const tokens = new Int32Array(batch * length).fill(padId);
  const labels = new Int32Array(batch * length).fill(IGNORED);
  const positions = new Int32Array(batch * length);
  const segmentIds = new Int32Array(batch * length).fill(PADDING_SEGMENT);
  sequences.forEach((sequence, b) => {
    let start = b * length;
    sequence.forEach((row, segment) => {
      tokens.set(row.ids, start);
      labels.set(row.labels, start);
      segmentIds.fill(segment, start, start + row.ids.length);
      for (let t = 0; t < row.ids.length; t++) positions[start + t] = t;
      start += row.ids.length;
    });
  });
  return { batch, length, tokens, labels, positions, segmentIds };
}

/** What each position is to predict: the label behind it, -100 at the end of a row and where a segment ends. */
export function shiftLabels({
  batch,
  length,
  labels,
  segmentIds,
}: Pick<Batch, 'batch' | 'length' | 'labels' | 'segmentIds'>): Int32Array {
  const shifted = new Int32Array(batch * length).fill(IGNORED);
  for (let b = 0; b < batch; b++) {
    for (let i = b * length; i + 1 < (b + 1) * length; i++) {
      if (segmentIds[i] === segmentIds[i + 1]) shifted[i] = labels[i + 1] as number;
    }
  }
  return shifted;
}
