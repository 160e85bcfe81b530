import { QLoRAError } from '../errors.js';
import { encodeChat, maskOf, type TrainedTurn } from '../tokenizer/chat.js';
import type { EncodeOptions as TextOptions, Tokenizer } from '../tokenizer/tokenizer.js';
import { fitPair, type Limits, type Source, type Target } from './fit.js';
import { describePlace, type Message, type Row, type RowPlace } from './rows.js';
import { promptTemplate } from './templates.js';

/** Marks a token that the loss does not count. */
export const IGNORED = -100;

export interface EncodeOptions {
  /** Name of the prompt template for rows of instruction and output. Default 'alpaca'. */
  template?: string;
  /** Most tokens of the source with BOS. Default 1024, or maxLength where that is given. */
  sourceMaxLength?: number;
  /** Most tokens of the target with EOS. Default 256, or maxLength where that is given. */
  targetMaxLength?: number;
  /** Most tokens of a row. Default: the two limits together. */
  maxLength?: number;
  /** Trains the source too. Default false. */
  trainOnSource?: boolean;
  /** Of a conversation only the last assistant's turn is trained. Default false. */
  maskHistory?: boolean;
  /**
   * What becomes of special tokens that are written out in the data: 'parse' (default) makes tokens of them, as
   * transformers does; 'text' keeps them text, for data from people one does not trust.
   */
  specialTokens?: 'parse' | 'text';
}

/** A row as ids. labels[t] is ids[t] where the token is trained, else -100; not shifted. */
export interface EncodedRow {
  ids: Int32Array;
  labels: Int32Array;
  /** Tokens that were cut off, and how many of them from source and target. */
  truncated: number;
  cut: { source: number; target: number };
}

/** What a row becomes, to be shown. */
export interface RowExplanation {
  /** The text of each token; where it is no whole text (a part of a character), as the vocabulary spells it. */
  tokens: string[];
  ids: number[];
  trained: boolean[];
  truncated: number;
}

/**
 * Ids and labels of a row.
 * - instruction, prompt: BOS + source, target + EOS, encoded apart; the source is not trained.
 * - text: BOS + text + EOS, all trained.
 * - messages: the chat template's text; what the assistant says is trained.
 * - inputIds: as they are, never cut; no tokenizer needed.
 *
 * There is one BOS where the tokenizer has one. A row that is too long is cut inside its text: what opens the answer,
 * BOS and EOS stay.
 * Throws ERR_QLORA_NO_TARGETS for a row with nothing to train, ERR_QLORA_TOKENIZER_MISSING for text without a
 * tokenizer, ERR_QLORA_MAX_LENGTH where a limit leaves no room.
 */
export function encodeRow(
  row: Row,
  tokenizer: Tokenizer | undefined,
  options: EncodeOptions = {},
  place: RowPlace = { row: 1 },
): EncodedRow {
  const encoded = 'inputIds' in row ? encodeIds(row) : encodeText(row, needed(tokenizer, place), options, place);
  if (!hasTarget(encoded.labels)) throw noTargets(row, encoded, place);
  return encoded;
}

/** The row as `encodeRow` encodes it, in readable form. */
export function explainRow(
  row: Row,
  tokenizer: Tokenizer | undefined,
  options: EncodeOptions = {},
  place?: RowPlace,
): RowExplanation {
  const { ids, labels, truncated } = encodeRow(row, tokenizer, options, place);
  return {
    tokens: Array.from(ids, (id) => (tokenizer ? readable(tokenizer, id) : String(id))),
    ids: Array.from(ids),
    trained: Array.from(labels, (label) => label !== IGNORED),
    truncated,
  };
}

function readable(tokenizer: Tokenizer, id: number): string {
  const text = Buffer.from(tokenizer.surface(id)).toString('utf8');
  return text === '' || text.includes('\ufffd') ? (tokenizer.tokenOf(id) ?? `<${id}>`) : text;
}

function encodeIds({ inputIds, labels }: { inputIds: ArrayLike<number>; labels?: ArrayLike<number> }): EncodedRow {
  const ids = Int32Array.from(inputIds);
  return { ids, labels: Int32Array.from(labels ?? ids), truncated: 0, cut: { source: 0, target: 0 } };
}

type TextRow = Exclude<Row, { inputIds: ArrayLike<number> }>;

function encodeText(row: TextRow, tokenizer: Tokenizer, options: EncodeOptions, place: RowPlace): EncodedRow {
  const limits = limitsOf(options);
  if ('messages' in row) return encodeMessages(row.messages, tokenizer, options, limits, place);
  const how: TextOptions = { parseSpecialTokens: options.specialTokens !== 'text' };
  if ('text' in row) return encodePlain(row.text, tokenizer, how, limits);
  const { text, tail, completion } = promptOf(row, options.template);
  const source = sourceOf(text, tail, tokenizer, how);
  const eos = tokenizer.eosTokenId === undefined ? [] : [tokenizer.eosTokenId];
  const target: Target = { ids: [...tokenizer.encode(completion, how), ...eos], closing: eos.length };
  return join(source, target, limits, options.trainOnSource === true, place);
}

function promptOf(
  row: Exclude<TextRow, { messages: Message[] } | { text: string }>,
  template: string | undefined,
): { text: string; tail: string; completion: string } {
  if ('prompt' in row) return { text: row.prompt, tail: '', completion: row.completion };
  const { source, tail } = promptTemplate(template);
  return { text: source(row), tail, completion: row.output };
}

/** BOS and the prompt; `tail` counts the tokens that touch the tail's text, which a cut leaves alone. */
function sourceOf(text: string, tail: string, tokenizer: Tokenizer, how: TextOptions): Source {
  const prompt = text + tail;
  const ids = tokenizer.encode(prompt, how);
  const before = tail === '' ? ids.length : (tokenizer.tokensBefore(prompt, ids, [text.length], how)[0]?.whole ?? 0);
  return { ...withBos(ids, tokenizer), tail: ids.length - before };
}

/** One BOS: a text that begins with it gets no other. */
export function withBos(ids: number[], { bosTokenId }: Tokenizer): { ids: number[]; head: number } {
  if (bosTokenId === undefined) return { ids, head: 0 };
  return { ids: ids[0] === bosTokenId ? ids : [bosTokenId, ...ids], head: 1 };
}

function encodePlain(text: string, tokenizer: Tokenizer, how: TextOptions, limits: Limits): EncodedRow {
  const { ids } = withBos(tokenizer.encode(text, how), tokenizer);
  const eos = tokenizer.eosTokenId;
  if (eos !== undefined && ids.at(-1) !== eos) ids.push(eos);
  const cut = Math.max(0, ids.length - limits.total);
  if (cut > 0) ids.splice(ids.length - cut - (eos === undefined ? 0 : 1), cut);
  const all = Int32Array.from(ids);
  return { ids: all, labels: all.slice(), truncated: cut, cut: { source: 0, target: cut } };
}

function join(source: Source, target: Target, limits: Limits, trainOnSource: boolean, place: RowPlace): EncodedRow {
  const fitted = fitPair(source, target, limits);
  if (typeof fitted === 'string') throw tooShort(fitted, limits, place);
  const ids = Int32Array.from([...fitted.source, ...fitted.target]);
  const labels = ids.slice();
  if (!trainOnSource) labels.fill(IGNORED, 0, fitted.source.length);
  const { cut } = fitted;
  return { ids, labels, truncated: cut.source + cut.target, cut };
}

/**
 * A conversation that is too long ends with the last assistant's turn that fits. Where not even the first does, that
 * turn and what comes before it are cut as a source and a target are: what opens and what closes the turn stay.
 */
function encodeMessages(
  messages: readonly Message[],
  tokenizer: Tokenizer,
  options: EncodeOptions,
  limits: Limits,
  place: RowPlace,
): EncodedRow {
  const { maskHistory = false, trainOnSource = false, specialTokens = 'parse' } = options;
  const { ids, turns } = encodeChat(tokenizer, messages, { specialTokens });
  const wanted = trainOnSource ? turns.filter((turn) => turn !== undefined) : exactTurns(turns, maskHistory, place);
  const trained = wanted.filter((turn) => turn.end <= limits.total);
  const first = wanted[0];
  if (ids.length > limits.total && trained.length === 0 && first) {
    const source: Source = { ids: ids.slice(0, first.start), head: startsWithBos(ids, tokenizer), tail: first.opening };
    const target: Target = { ids: ids.slice(first.start, first.end), closing: first.closing };
    const { total } = limits;
    const encoded = join(source, target, { source: total, target: total, total }, trainOnSource, place);
    return { ...encoded, truncated: ids.length - encoded.ids.length };
  }
  const end = ids.length > limits.total ? (trained.at(-1)?.end ?? limits.total) : ids.length;
  const kept = Int32Array.from(ids.slice(0, end));
  const labels = trainOnSource ? kept.slice() : new Int32Array(end).fill(IGNORED);
  const mask = maskOf(tokenizer, ids, trained);
  for (let t = 0; t < end; t++) if (mask[t]) labels[t] = kept[t] as number;
  return { ids: kept, labels, truncated: ids.length - end, cut: { source: 0, target: ids.length - end } };
}

function startsWithBos(ids: readonly number[], { bosTokenId }: Tokenizer): number {
  return bosTokenId !== undefined && ids[0] === bosTokenId ? 1 : 0;
}

/** The turns that are to be trained, all of which must have been found. */
function exactTurns(turns: readonly (TrainedTurn | undefined)[], maskHistory: boolean, place: RowPlace): TrainedTurn[] {
  const wanted = maskHistory ? turns.slice(-1) : turns;
  const exact = wanted.filter((turn) => turn !== undefined);
  if (exact.length === wanted.length) return exact;
  throw new QLoRAError(
    'ERR_QLORA_CHAT_TEMPLATE',
    `The chat template writes the earlier messages of ${describePlace(place)} otherwise once the conversation goes on, ` +
      "so it cannot be told which tokens are the assistant's",
    {
      hint: maskHistory
        ? 'Use another chat template, or rows of prompt and completion.'
        : 'Set maskHistory: true to train the last turn of each conversation only.',
      detail: { ...place },
    },
  );
}

/** Limits in tokens, checked. */
function limitsOf({ sourceMaxLength, targetMaxLength, maxLength }: EncodeOptions): Limits {
  const source = positive('sourceMaxLength', sourceMaxLength ?? maxLength ?? 1024);
  const target = positive('targetMaxLength', targetMaxLength ?? maxLength ?? 256);
  return { source, target, total: positive('maxLength', maxLength ?? source + target) };
}

function positive(name: string, value: number): number {
  if (Number.isInteger(value) && value > 0) return value;
  throw new QLoRAError('ERR_QLORA_OPTION_INVALID', `${name} must be an integer from 1, it is ${value}`, {
    hint: `Leave ${name} out for its default.`,
    detail: { option: name, value },
  });
}

function hasTarget(labels: Int32Array): boolean {
  // Label t+1 is predicted from t, so the first label is never counted.
  for (let t = 1; t < labels.length; t++) if (labels[t] !== IGNORED) return true;
  return false;
}

function noTargets(row: Row, { ids }: EncodedRow, place: RowPlace): QLoRAError {
  const why =
    'messages' in row
      ? "no message is the assistant's"
      : ids.length < 2
        ? `its ${ids.length} token${ids.length === 1 ? '' : 's'} leave nothing to predict`
        : 'every label is -100';
  return new QLoRAError('ERR_QLORA_NO_TARGETS', `In ${describePlace(place)} there is no token to train: ${why}`, {
    hint: 'Take the row out, or give it an answer.',
    detail: { ...place },
  });
}

function tooShort(what: string, limits: Limits, place: RowPlace): QLoRAError {
  return new QLoRAError(
    'ERR_QLORA_MAX_LENGTH',
    `${describePlace(place).replace(/^r/, 'R')} cannot be cut to fit: ${what}`,
    {
      hint: 'Raise sourceMaxLength, targetMaxLength or maxLength.',
      detail: { ...limits, ...place },
    },
  );
}

function needed(tokenizer: Tokenizer | undefined, place: RowPlace): Tokenizer {
  if (tokenizer) return tokenizer;
  throw new QLoRAError(
    'ERR_QLORA_TOKENIZER_MISSING',
    `${describePlace(place).replace(/^r/, 'R')} is text, and the model has no tokenizer.json`,
    {
      hint: 'Copy tokenizer.json and tokenizer_config.json into the model folder, or pass rows of inputIds.',
      detail: { ...place, missing: 'tokenizer.json' },
    },
  );
}
