import { QLoRAError } from '../errors.js';
import { ChatTemplate } from './chat-template.js';
import {
  type AddedTokenEntry,
  invalidTokenizer,
  readTokenizerFiles,
  type TokenizerFiles,
  tokenContent,
} from './files.js';
import { fixDecoder, fixNormalizer, fixPreTokenizer, type HfTokenizer } from './package.js';
import { type Range, Splitter } from './splitter.js';
import { StreamDecoder, type StreamOptions } from './stream-decoder.js';
import { surfaceOf, tokenEnds, type VocabularyStyle, vocabularyStyle } from './surface.js';

export interface EncodeOptions {
  /** Adds what the tokenizer's post-processor adds (BOS, EOS). Default false: callers place them. */
  addSpecialTokens?: boolean;
  /**
   * Whether a special token that is written out in the text becomes that token. Default false: text from users stays
   * text. True for text that a template made, and for what must equal transformers' encoding.
   */
  parseSpecialTokens?: boolean;
  /** With `parseSpecialTokens`: parts of the text (in UTF-16 units) in which special tokens are text all the same. */
  textRanges?: readonly Range[];
}

export interface DecodeOptions {
  /** Leaves special tokens out. Default false. */
  skipSpecialTokens?: boolean;
}

/** Number of tokens that lie before a place in the text. */
export interface TokenPlace {
  /** Tokens that end at or before the place. */
  whole: number;
  /** `whole`, and one more where a token straddles the place. */
  touched: number;
}

/**
 * A model folder's tokenizer: tokenizer.json through @huggingface/tokenizers, which it corrects where that package
 * differs from the `tokenizers` library (SentencePiece's compiled normalization, byte-order marks, invalid bytes).
 */
export class Tokenizer {
  readonly directory: string;
  /** undefined where the tokenizer has none. Nothing stands in for a missing one. */
  readonly bosTokenId: number | undefined;
  readonly eosTokenId: number | undefined;
  readonly padTokenId: number | undefined;
  readonly unkTokenId: number | undefined;
  /** Highest id + 1. A model's embedding may have more rows. */
  readonly vocabSize: number;
  readonly style: VocabularyStyle;
  readonly chatTemplates: ReadonlyMap<string, ChatTemplate>;
  /** Fields of tokenizer_config.json. */
  readonly config: Readonly<Record<string, unknown>>;
  readonly #hf: HfTokenizer;
  readonly #added: ReadonlyMap<number, AddedTokenEntry>;
  readonly #special: ReadonlySet<number>;
  readonly #allTokens: Splitter;
  readonly #plainTokens: Splitter;
  readonly #surfaces: (Uint8Array | undefined)[] = [];
  /** The token of one space, where the post-processor gives it no place in the text. */
  readonly #placeless: number | undefined;

  /**
   * Loads tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja; only the first must
   * be there. Throws ERR_QLORA_TOKENIZER_MISSING, ERR_QLORA_TOKENIZER_INVALID or, where the package
   * @huggingface/tokenizers is not installed, ERR_QLORA_DEPENDENCY_MISSING.
   */
  static async load(directory: string): Promise<Tokenizer> {
    const files = await readTokenizerFiles(directory);
    const { Tokenizer: HfTokenizer } = await importTokenizers();
    let hf: HfTokenizer;
    try {
      hf = new HfTokenizer(files.json, files.config);
      fixNormalizer(hf.normalizer);
      fixPreTokenizer(hf.pre_tokenizer, files.json.pre_tokenizer);
      fixDecoder(hf.decoder);
    } catch (error) {
      throw invalidTokenizer(directory, (error as Error).message, error);
    }
    const templates = new Map<string, ChatTemplate>();
    for (const [name, source] of files.chatTemplates) templates.set(name, await ChatTemplate.create(source));
    return new Tokenizer(files, hf, templates);
  }

  private constructor(files: TokenizerFiles, hf: HfTokenizer, templates: ReadonlyMap<string, ChatTemplate>) {
    const { json, config } = files;
    this.directory = files.directory;
    this.config = config;
    this.chatTemplates = templates;
    this.style = vocabularyStyle(json.decoder);
    this.#hf = hf;
    this.#added = new Map(json.added_tokens.map((token) => [token.id, token]));
    this.bosTokenId = this.#idOfRole('bos_token');
    this.eosTokenId = this.#idOfRole('eos_token');
    this.padTokenId = this.#idOfRole('pad_token');
    this.unkTokenId = this.#idOfRole('unk_token');
    const special = new Set(json.added_tokens.filter((token) => token.special).map((token) => token.id));
    for (const id of [this.bosTokenId, this.eosTokenId, this.padTokenId, this.unkTokenId]) {
      if (id !== undefined) special.add(id);
    }
    const additional = Array.isArray(config.additional_special_tokens) ? config.additional_special_tokens : [];
    for (const entry of additional as unknown[]) {
      const id = hf.token_to_id(tokenContent(entry) ?? '');
      if (id !== undefined) special.add(id);
    }
    this.#special = special;
    this.vocabSize = hf.model.vocab.length;
    this.#placeless = trimsOffsets(json.post_processor) ? hf.token_to_id('Ġ') : undefined;
    this.#allTokens = new Splitter(json.added_tokens);
    this.#plainTokens = new Splitter(json.added_tokens.filter((token) => !token.special));
  }

  #idOfRole(role: string): number | undefined {
    const content = tokenContent(this.config[role]);
    return content === undefined ? undefined : this.#hf.token_to_id(content);
  }

  /** Ids of `text`. Never longer than the text's UTF-8 bytes plus what is added. */
  encode(text: string, options: EncodeOptions = {}): number[] {
    const { addSpecialTokens = false, parseSpecialTokens = false, textRanges = [] } = options;
    if (parseSpecialTokens && textRanges.length === 0) {
      return this.#hf.encode(text, { add_special_tokens: addSpecialTokens }).ids.filter((id) => id !== undefined);
    }
    const tokens = this.#tokensAsText(text, parseSpecialTokens ? textRanges : undefined);
    const all =
      addSpecialTokens && this.#hf.post_processor ? this.#hf.post_processor(tokens, null, true).tokens : tokens;
    return all
      .map((token) => this.#hf.token_to_id(token) ?? this.#hf.model.unk_token_id)
      .filter((id) => id !== undefined);
  }

  /**
   * The package's own way from a text to tokens, with another choice of what is an added token: all but the special
   * ones or, given ranges, all outside these.
   */
  #tokensAsText(text: string, ranges: readonly Range[] | undefined): string[] {
    const { normalizer, pre_tokenizer: split, model } = this.#hf;
    const sections = ranges === undefined ? this.#plainTokens.split(text) : this.#allTokens.split(text, ranges);
    return sections.flatMap((section, index) => {
      if (section.token) return [section.token.content];
      const normalized = normalizer ? normalizer(section.text) : section.text;
      if (normalized.length === 0) return [];
      return model(split ? split(normalized, { section_index: index }) : [normalized]);
    });
  }

  /** Where special tokens are written out in `text`. */
  specialRanges(text: string): Range[] {
    const ranges: Range[] = [];
    let start = 0;
    for (const section of this.#allTokens.split(text, [], 'exact')) {
      const length = section.token ? section.token.content.length : section.text.length;
      if (section.token && this.#special.has(section.token.id)) ranges.push({ start, end: start + length });
      start += length;
    }
    return ranges;
  }

  /** Text of `ids`; an id that the vocabulary lacks (a padded embedding may have such) gives nothing. */
  decode(ids: ArrayLike<number>, { skipSpecialTokens = false }: DecodeOptions = {}): string {
    const known = Array.from(ids).filter(
      (id) => this.#hf.id_to_token(id) !== undefined && !(skipSpecialTokens && this.#special.has(id)),
    );
    if (known.length === 0) return '';
    // The package cleans by default; transformers does where the configuration asks for it.
    const clean = this.config.clean_up_tokenization_spaces === true;
    return this.#hf.decode(known, { clean_up_tokenization_spaces: clean });
  }

  /** A decoder for ids that come one by one. */
  stream(options?: StreamOptions): StreamDecoder {
    return new StreamDecoder(this, options);
  }

  /** The token as the vocabulary spells it, e.g. '▁the' or 'Ġthe'. */
  tokenOf(id: number): string | undefined {
    return this.#hf.id_to_token(id);
  }

  idOf(token: string): number | undefined {
    return this.#hf.token_to_id(token);
  }

  isSpecial(id: number): boolean {
    return this.#special.has(id);
  }

  isAdded(id: number): boolean {
    return this.#added.has(id);
  }

  /**
   * Whether the token has a place in the text. A lone space has none where the post-processor trims offsets (Llama 3's
   * does): masks made by offsets, as the `tokenizers` library makes them, leave it out, and so do ours. Longer runs of
   * spaces, which are the indentation of code, count here though offsets would leave them out too.
   */
  hasPlace(id: number): boolean {
    return id !== this.#placeless;
  }

  /** The bytes that the token stands for; empty for an unknown id. */
  surface(id: number): Uint8Array {
    let bytes = this.#surfaces[id];
    if (bytes === undefined) {
      const added = this.#added.get(id);
      if (added) bytes = Buffer.from(added.content);
      else bytes = surfaceOf(this.#hf.id_to_token(id) ?? '', this.style);
      this.#surfaces[id] = bytes;
    }
    return bytes;
  }

  /**
   * How many of `ids` lie before each of `places` (UTF-16 offsets into `text`, of which `ids` is the encoding by `how`). Exact where
   * tokens spell the text; elsewhere by encoding what is before the place.
   */
  tokensBefore(text: string, ids: readonly number[], places: readonly number[], how: EncodeOptions = {}): TokenPlace[] {
    const ends = tokenEnds(
      Buffer.from(text),
      ids.map((id) => this.surface(id)),
    );
    if (ends === undefined) return places.map((place) => this.#tokensBeforeByPrefix(text, ids, place, how));
    return places.map((place) => {
      const byte = Buffer.byteLength(text.slice(0, place));
      const startOf = (i: number): number => (i === 0 ? 0 : (ends[i - 1] as number));
      let whole = 0;
      // A token without width at the place (a space put before a word) belongs to what follows.
      while (whole < ends.length && (ends[whole] as number) <= byte && startOf(whole) < byte) whole++;
      return { whole, touched: whole < ends.length && startOf(whole) < byte ? whole + 1 : whole };
    });
  }

  #tokensBeforeByPrefix(text: string, ids: readonly number[], place: number, how: EncodeOptions): TokenPlace {
    const prefix = this.encode(text.slice(0, place), how);
    let whole = 0;
    while (whole < prefix.length && prefix[whole] === ids[whole]) whole++;
    if (whole === prefix.length) return { whole, touched: whole };
    let left = prefix.slice(whole).reduce((sum, id) => sum + this.surface(id).length, 0);
    while (whole < ids.length && this.surface(ids[whole] as number).length <= left) {
      left -= this.surface(ids[whole++] as number).length;
    }
    return { whole, touched: left > 0 && whole < ids.length ? whole + 1 : whole };
  }

  /** The chat template of that name. Throws ERR_QLORA_CHAT_TEMPLATE_MISSING. */
  chatTemplate(name = 'default'): ChatTemplate {
    const template = this.chatTemplates.get(name);
    if (template) return template;
    const names = [...this.chatTemplates.keys()];
    throw new QLoRAError(
      'ERR_QLORA_CHAT_TEMPLATE_MISSING',
      `The tokenizer in ${this.directory} has no chat template${name === 'default' ? '' : ` named '${name}'`}` +
        (names.length > 0 ? ` (it has ${names.join(', ')})` : ''),
      {
        hint: 'Base models have none: use rows of instruction and output or of prompt and completion, or put a chat_template.jinja into the model folder.',
        detail: { directory: this.directory, name, names },
      },
    );
  }

  /** The variables that chat templates may use for special tokens: those that the tokenizer has. */
  get templateTokens(): Record<string, string> {
    const tokens: Record<string, string> = {};
    for (const role of ['bos_token', 'eos_token', 'pad_token', 'unk_token']) {
      const content = tokenContent(this.config[role]);
      if (content !== undefined) tokens[role] = content;
    }
    return tokens;
  }
}

/** A ByteLevel post-processor with trim_offsets, alone or in a sequence. */
function trimsOffsets(processor: unknown): boolean {
  const { type, trim_offsets, processors } = (processor ?? {}) as Record<string, unknown>;
  if (type === 'ByteLevel') return trim_offsets !== false;
  return Array.isArray(processors) && processors.some(trimsOffsets);
}

async function importTokenizers(): Promise<{ Tokenizer: new (json: object, config: object) => HfTokenizer }> {
  try {
    return (await import('@huggingface/tokenizers')) as unknown as Awaited<ReturnType<typeof importTokenizers>>;
  } catch (error) {
    throw new QLoRAError('ERR_QLORA_DEPENDENCY_MISSING', 'Text needs the package @huggingface/tokenizers', {
      hint: 'npm install @huggingface/tokenizers, or pass token ids instead of text.',
      cause: error,
    });
  }
}
