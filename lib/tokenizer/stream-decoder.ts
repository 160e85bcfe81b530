/** What a StreamDecoder needs of a tokenizer. */
export interface StreamSource {
  readonly style: { readonly kind: 'byte-level' | 'pieces' | 'other'; readonly leadingSpaces: number };
  surface(id: number): Uint8Array;
  isSpecial(id: number): boolean;
  isAdded(id: number): boolean;
  decode(ids: ArrayLike<number>, options?: { skipSpecialTokens?: boolean }): string;
}

export interface StreamOptions {
  /** Leaves special tokens out of the text. Default true. */
  skipSpecialTokens?: boolean;
  /** Ids that come before and are not decoded. With any, a first space is text; without, it goes as in `decode`. */
  context?: ArrayLike<number>;
}

/**
 * Turns ids into text one by one: `push` gives the text that is new and certain, holding back bytes of a character
 * that is not whole yet; `finish` gives the rest. The pieces joined are what `decode` gives of all ids (but for
 * tokenizers whose configuration cleans up spaces, which needs to look ahead; a stream does not clean).
 */
export class StreamDecoder {
  #utf8 = new TextDecoder('utf-8', { ignoreBOM: true });
  #leadingSpaces: number;
  readonly #source: StreamSource;
  readonly #skipSpecial: boolean;
  readonly #ids: number[] = [];
  #given = 0;

  constructor(source: StreamSource, { skipSpecialTokens = true, context = [] }: StreamOptions = {}) {
    this.#source = source;
    this.#skipSpecial = skipSpecialTokens;
    this.#leadingSpaces = context.length > 0 ? 0 : source.style.leadingSpaces;
  }

  push(id: number): string {
    if (this.#skipSpecial && this.#source.isSpecial(id)) return '';
    if (this.#source.style.kind === 'other') return this.#pushWhole(id);
    const bytes = this.#source.surface(id);
    // An added token is text of its own: what was incomplete before it stays incomplete.
    const text = this.#source.isAdded(id)
      ? this.#utf8.decode() + new TextDecoder('utf-8', { ignoreBOM: true }).decode(bytes)
      : this.#utf8.decode(bytes, { stream: true });
    return this.#withoutLeadingSpaces(text);
  }

  /** The rest, to be called once at the end: U+FFFD where the last character never became whole. */
  finish(): string {
    if (this.#source.style.kind === 'other') return this.#source.decode(this.#ids).slice(this.#given);
    return this.#withoutLeadingSpaces(this.#utf8.decode());
  }

  #withoutLeadingSpaces(text: string): string {
    let cut = 0;
    while (this.#leadingSpaces > 0 && cut < text.length) {
      if (text[cut] !== ' ') this.#leadingSpaces = 0;
      else {
        cut++;
        this.#leadingSpaces--;
      }
    }
    return text.slice(cut);
  }

  #pushWhole(id: number): string {
    this.#ids.push(id);
    const text = this.#source.decode(this.#ids);
    if (text.endsWith('\ufffd')) return '';
    const piece = text.slice(this.#given);
    this.#given = Math.max(this.#given, text.length);
    return piece;
  }
}
