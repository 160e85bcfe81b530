import { QLoRAError } from '../errors.js';
import type { EncodeOptions as TextOptions, Tokenizer } from '../tokenizer/tokenizer.js';
import { encodeMessages, encodeQuestion } from './encode-messages.js';
import { type EncodedRow, type EncodeOptions, IGNORED, join } from './encoded-row.js';
import type { Limits, Source, Target } from './fit.js';
import { capital } from './row-fields.js';
import { describePlace, type Row, type RowPlace } from './rows.js';
import { asksInChat, promptTemplate } from './templates.js';

export { type EncodedRow, type EncodeOptions, IGNORED } from './encoded-row.js';

/**
 * Ids and labels of a row.
 * - instruction, prompt: BOS + source, target + EOS, encoded apart; the source is not trained. With the template of a
 *   chat model an instruction is a conversation of one question.
 * - text: BOS + text + EOS, all trained.
 * - messages: the chat template's text; what the assistant says is trained, calls of tools too, their results not.
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
  const encoded = encodeAny(row, tokenizer, options, place);
  const why = whyNoTargets(row, encoded);
  if (why !== undefined) throw noTargets(describePlace(place), why, { ...place });
  return encoded;
}

/** The same, also for a row with nothing to train. */
export function encodeAny(
  row: Row,
  tokenizer: Tokenizer | undefined,
  options: EncodeOptions,
  place: RowPlace,
): EncodedRow {
  return 'inputIds' in row ? encodeIds(row) : encodeText(row, needed(tokenizer, place), options, place);
}

function encodeIds({ inputIds, labels }: { inputIds: ArrayLike<number>; labels?: ArrayLike<number> }): EncodedRow {
  const ids = Int32Array.from(inputIds);
  return { ids, labels: Int32Array.from(labels ?? ids), truncated: 0, cut: { source: 0, target: 0 } };
}

type TextRow = Exclude<Row, { inputIds: ArrayLike<number> }>;

function encodeText(row: TextRow, tokenizer: Tokenizer, options: EncodeOptions, place: RowPlace): EncodedRow {
  const limits = limitsOf(options);
  if ('messages' in row) return encodeMessages(row, tokenizer, options, limits, place);
  const how: TextOptions = { parseSpecialTokens: options.specialTokens !== 'text' };
  if ('text' in row) return encodePlain(row.text, tokenizer, how, limits);
  let [prompt, tail, answer] = ['', '', ''];
  if ('prompt' in row) [prompt, answer] = [row.prompt, row.completion];
  else {
    if (asksInChat(options.template)) return encodeQuestion(row, tokenizer, options, limits, place);
    const template = promptTemplate(options.template);
    [prompt, tail, answer] = [template.source(row), template.tail, row.output];
  }
  const source = sourceOf(prompt, tail, tokenizer, how);
  const eos = tokenizer.eosTokenId === undefined ? [] : [tokenizer.eosTokenId];
  const target: Target = { ids: [...tokenizer.encode(answer, how), ...eos], closing: eos.length };
  return join(source, target, limits, options.trainOnSource === true, place);
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

/** Why nothing of the row is trained; undefined where something is. */
export function whyNoTargets(row: Row, { ids, labels }: Pick<EncodedRow, 'ids' | 'labels'>): string | undefined {
  // Label t+1 is predicted from t, so the first label is never counted.
  for (let t = 1; t < labels.length; t++) if (labels[t] !== IGNORED) return undefined;
  if ('messages' in row) return "no message is the assistant's";
  if (ids.length < 2) return `its ${ids.length} token${ids.length === 1 ? '' : 's'} leave nothing to predict`;
  return 'every label is -100';
}

export function noTargets(where: string, why: string, detail: Record<string, unknown>): QLoRAError {
  return new QLoRAError('ERR_QLORA_NO_TARGETS', `In ${where} there is no token to train: ${why}`, {
    hint: 'Take the row out, or give it an answer.',
    detail,
  });
}

function needed(tokenizer: Tokenizer | undefined, place: RowPlace): Tokenizer {
  if (tokenizer) return tokenizer;
  throw new QLoRAError(
    'ERR_QLORA_TOKENIZER_MISSING',
    `${capital(describePlace(place))} is text, and the model has no tokenizer.json`,
    {
      hint: 'Copy tokenizer.json and tokenizer_config.json into the model folder, or pass rows of inputIds.',
      detail: { ...place, missing: 'tokenizer.json' },
    },
  );
}
