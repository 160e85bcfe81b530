/** Limits in tokens. */
export interface Limits {
  source: number;
  target: number;
  /** Of both together. */
  total: number;
}

/** What comes before the answer: `head` first tokens (BOS) and `tail` last tokens (what opens the answer) stay. */
export interface Source {
  ids: readonly number[];
  head: number;
  tail: number;
}

/** The answer, of which the `closing` last tokens (EOS) stay. */
export interface Target {
  ids: readonly number[];
  closing: number;
}

export interface Fitted {
  source: readonly number[];
  target: readonly number[];
  cut: { source: number; target: number };
}

/**
 * Cuts source and target to their limits, then to the total: from the source the tokens right before its tail go, from
 * the target the last ones before its closing. Says what does not fit where that leaves no room.
 */
export function fitPair(source: Source, target: Target, limits: Limits): Fitted | string {
  const lengths = {
    source: Math.min(source.ids.length, limits.source),
    target: Math.min(target.ids.length, limits.target),
  };
  const room = shareOf(lengths.source, lengths.target, limits.total);
  const fixed = source.head + source.tail;
  const sourceLength = Math.max(Math.min(lengths.source, room.source), Math.min(source.ids.length, fixed));
  const targetLength = Math.min(lengths.target, limits.total - sourceLength);
  if (sourceLength > limits.source) {
    return `BOS and what opens the answer take ${fixed} tokens, and the source may have ${limits.source}`;
  }
  if (targetLength < Math.min(target.ids.length, target.closing + 1)) {
    return `the answer needs ${target.closing + 1} tokens or more, and ${Math.max(targetLength, 0)} are left for it`;
  }
  const sourceCut = source.ids.length - sourceLength;
  const targetCut = target.ids.length - targetLength;
  return {
    source: without(source.ids, source.ids.length - source.tail, sourceCut),
    target: without(target.ids, target.ids.length - target.closing, targetCut),
    cut: { source: sourceCut, target: targetCut },
  };
}

/**
 * How a total is shared: whichever of the two takes less than half of it is left whole; where both take more, each
 * gets its part.
 */
function shareOf(source: number, target: number, total: number): { source: number; target: number } {
  if (source + target <= total) return { source, target };
  if (2 * target < total) return { source: total - target, target };
  if (2 * source < total) return { source, target: total - source };
  const part = Math.floor((total * target) / (source + target));
  return { source: total - part, target: part };
}

/** `ids` without the `count` entries before `end`. */
function without(ids: readonly number[], end: number, count: number): readonly number[] {
  return count === 0 ? ids : [...ids.slice(0, end - count), ...ids.slice(end)];
}
