import type { Tokenizer } from '../tokenizer/tokenizer.js';

/** Whether the last of `ids` completes a stop string. */
export function endsWithStop(tokenizer: Tokenizer, stops: readonly string[], ids: readonly number[]): boolean {
  if (stops.length === 0) return false;
  // A token is a byte or more; some bytes of a character may be in front.
  const reach = Math.max(...stops.map((stop) => Buffer.byteLength(stop))) + 4;
  const text = tokenizer.decode(ids.slice(-reach), { skipSpecialTokens: true });
  return stops.some((stop) => text.includes(stop));
}

/** Holds back what may be the start of a stop string, until it is one or cannot become one. */
export class StopStrings {
  #held = '';
  #found = false;
  readonly #stops: readonly string[];

  constructor(stops: readonly string[]) {
    this.#stops = stops;
  }

  get found(): boolean {
    return this.#found;
  }

  /** The text that is certain to come before any stop string. */
  push(text: string): string {
    if (this.#found) return '';
    this.#held += text;
    const starts = this.#stops.map((stop) => this.#held.indexOf(stop)).filter((i) => i >= 0);
    if (starts.length > 0) {
      this.#found = true;
      return this.#held.slice(0, Math.min(...starts));
    }
    const keep = Math.max(0, ...this.#stops.map((stop) => overlap(this.#held, stop)));
    const sure = this.#held.slice(0, this.#held.length - keep);
    this.#held = this.#held.slice(sure.length);
    return sure;
  }

  /** What was held back when the text ends. */
  finish(): string {
    return this.#found ? '' : this.#held;
  }
}

/** Length of the longest end of `text` that `stop` begins with. */
function overlap(text: string, stop: string): number {
  for (let n = Math.min(text.length, stop.length - 1); n > 0; n--) {
    if (text.endsWith(stop.slice(0, n))) return n;
  }
  return 0;
}
