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

/** The same for ids: those whose text lies wholly before any stop string. An id that ends no character waits for the next. */
export class StopIds {
  readonly #stop: StopStrings;
  readonly #decoder: { push(id: number): string };
  #waiting: { id: number; end: number }[] = [];
  /** Length of all text, and of what is certain to come before a stop string. */
  #length = 0;
  #sure = 0;

  constructor(stops: readonly string[], decoder: { push(id: number): string }) {
    this.#stop = new StopStrings(stops);
    this.#decoder = decoder;
  }

  get found(): boolean {
    return this.#stop.found;
  }

  push(id: number): number[] {
    const text = this.#decoder.push(id);
    this.#length += text.length;
    this.#sure += this.#stop.push(text).length;
    this.#waiting.push({ id, end: Number.POSITIVE_INFINITY });
    if (text === '') return [];
    for (const one of this.#waiting) one.end = Math.min(one.end, this.#length);
    const sure = this.#waiting.filter(({ end }) => end <= this.#sure);
    this.#waiting = this.#waiting.slice(sure.length);
    return sure.map((one) => one.id);
  }

  finish(): number[] {
    return this.found ? [] : this.#waiting.map(({ id }) => id);
  }
}

/** Length of the longest end of `text` that `stop` begins with. */
function overlap(text: string, stop: string): number {
  for (let n = Math.min(text.length, stop.length - 1); n > 0; n--) {
    if (text.endsWith(stop.slice(0, n))) return n;
  }
  return 0;
}
