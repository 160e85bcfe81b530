/** What an error carries besides its message. */
export interface ErrorDetail {
  /** What to do about it, in one sentence. */
  hint?: string;
  /** The values involved, for programs; the message already names them for people. */
  detail?: Readonly<Record<string, unknown>>;
  cause?: unknown;
}

/**
 * Every error the library throws. `code` is stable and listed in docs/errors.md; the message names what was
 * expected and what came; `hint` says what to do.
 */
export class QLoRAError extends Error {
  readonly code: `ERR_QLORA_${string}`;
  readonly hint?: string;
  readonly detail?: Readonly<Record<string, unknown>>;

  constructor(code: `ERR_QLORA_${string}`, message: string, { hint, detail, cause }: ErrorDetail = {}) {
    super(message, cause === undefined ? undefined : { cause });
    this.name = 'QLoRAError';
    this.code = code;
    if (hint !== undefined) this.hint = hint;
    if (detail !== undefined) this.detail = detail;
  }
}

/** Names of `known` closest to `name` by edit distance, nearest first; empty where nothing is near. */
export function didYouMean(name: string, known: Iterable<string>): string | undefined {
  let best: string | undefined;
  let bestDistance = Math.max(2, Math.floor(name.length / 3)) + 1;
  for (const candidate of known) {
    const distance = editDistance(name.toLowerCase(), candidate.toLowerCase(), bestDistance);
    if (distance < bestDistance) {
      bestDistance = distance;
      best = candidate;
    }
  }
  return best;
}

/**
 * The value of an option that was probably meant: near in spelling, or of the same beginning (adam, adamw_torch), or
 * what the given one spells out (bfloat16).
 */
export function nearestValue(given: string, known: readonly string[]): string | undefined {
  const value = given.toLowerCase();
  const shared = (candidate: string) => {
    const differs = [...candidate].findIndex((letter, i) => letter !== value[i]);
    return differs < 0 ? candidate.length : differs;
  };
  const typed = known.find((candidate) => editDistance(value, candidate.toLowerCase(), 3) <= 1);
  const begins = known.filter((candidate) => shared(candidate) >= 3).sort((a, b) => shared(b) - shared(a));
  const spelt = known.filter((candidate) => [...candidate].every(inOrder(value))).sort((a, b) => b.length - a.length);
  return typed ?? begins[0] ?? didYouMean(value, known) ?? spelt[0];
}

/** Whether letters come in `text`, each behind the one before. */
function inOrder(text: string): (letter: string) => boolean {
  let at = -1;
  return (letter) => {
    at = text.indexOf(letter, at + 1);
    return at >= 0;
  };
}

/** Levenshtein distance of a and b, or `limit` where it is at least that. */
function editDistance(a: string, b: string, limit: number): number {
  if (Math.abs(a.length - b.length) >= limit) return limit;
  let previous = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const current = [i];
    for (let j = 1; j <= b.length; j++) {
      const substitution = (previous[j - 1] as number) + (a[i - 1] === b[j - 1] ? 0 : 1);
      current.push(Math.min((previous[j] as number) + 1, (current[j - 1] as number) + 1, substitution));
    }
    previous = current;
  }
  return previous[b.length] as number;
}
