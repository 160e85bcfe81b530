import type { AddedTokenEntry } from './files.js';

/** A part of a text, in UTF-16 units. */
export interface Range {
  start: number;
  end: number;
}

export type Section = { text: string; token?: undefined } | { text?: undefined; token: AddedTokenEntry };

/** Splits text at added tokens, the longest first; a token that takes in the space beside it (lstrip, rstrip) does so. */
export class Splitter {
  readonly #pattern: RegExp | undefined;
  readonly #tokens: ReadonlyMap<string, AddedTokenEntry>;

  constructor(tokens: readonly AddedTokenEntry[]) {
    this.#tokens = new Map(tokens.map((token) => [token.content, token]));
    const contents = [...this.#tokens.keys()].sort((a, b) => b.length - a.length);
    const escaped = contents.map((content) => content.replace(/[.*+?^${}()|[\]\\/]/g, '\\$&'));
    this.#pattern = escaped.length > 0 ? new RegExp(escaped.join('|'), 'g') : undefined;
  }

  /** Matches that touch one of `ranges` are text. 'exact' leaves spaces where they are. */
  split(text: string, ranges: readonly Range[] = [], spaces: 'strip' | 'exact' = 'strip'): Section[] {
    const sections: Section[] = [];
    const pattern = this.#pattern;
    let start = 0;
    const push = (end: number, next: AddedTokenEntry | undefined): void => {
      let part = text.slice(start, end);
      if (spaces === 'strip') {
        if (next?.lstrip) part = part.trimEnd();
        if (sections.at(-1)?.token?.rstrip) part = part.trimStart();
      }
      if (part.length > 0) sections.push({ text: part });
      if (next) sections.push({ token: next });
    };
    if (pattern) {
      pattern.lastIndex = 0;
      for (let match = pattern.exec(text); match; match = pattern.exec(text)) {
        const end = match.index + match[0].length;
        const from = match.index;
        if (ranges.some((range) => range.start < end && range.end > from)) {
          pattern.lastIndex = from + 1;
          continue;
        }
        push(from, this.#tokens.get(match[0]));
        start = end;
      }
    }
    push(text.length, undefined);
    return sections;
  }
}
