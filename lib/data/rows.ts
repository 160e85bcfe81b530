import { didYouMean, QLoRAError } from '../errors.js';

import { type Message, messagesOf, openaiKeys, sharegptKeys, toolsOf } from './messages.js';
import { type Fields, invalid, kindOf, optionalText, type RowPlace, text } from './row-fields.js';

export type { Message, Role } from './messages.js';
export { describePlace, type RowPlace } from './row-fields.js';

/** The shapes of a training example, as in the public API. */
export type Row =
  | { messages: Message[]; tools?: readonly unknown[] }
  | { text: string }
  | { prompt: string; completion: string }
  | { instruction: string; input?: string; output: string }
  | { inputIds: ArrayLike<number>; labels?: ArrayLike<number> };

export interface LocatedRow {
  row: Row;
  place: RowPlace;
}

/** A way to read a record of a data set as a row. `needs` must be there for the format to be inferred. */
interface RowFormat {
  readonly needs: readonly string[];
  readonly toRow: (fields: Fields, place: RowPlace) => Row;
}

const alpaca: RowFormat = {
  needs: ['instruction', 'output'],
  toRow: (f, at) => ({
    instruction: text(f, 'instruction', at),
    input: optionalText(f, 'input', at),
    output: text(f, 'output', at),
  }),
};
const chat: RowFormat = {
  needs: ['messages'],
  toRow: (f, at) => ({ messages: messagesOf(f, 'messages', openaiKeys, at), ...toolsOf(f, at) }),
};
const inputOutput = pair('input', 'output');
const table: RowFormat = {
  needs: ['output'],
  toRow: (f, at) => (f.instruction === undefined ? inputOutput : alpaca).toRow(f, at),
};
const idsToRow: RowFormat['toRow'] = (f, at) => idsRow(f.inputIds ?? f.input_ids, f.labels, at);

/** By the names that `datasetFormat` takes; for inference the first whose fields are all there. */
const FORMATS: Readonly<Record<string, RowFormat>> = {
  'input-ids': { needs: ['inputIds'], toRow: idsToRow },
  input_ids: { needs: ['input_ids'], toRow: idsToRow },
  messages: chat,
  openai: chat,
  sharegpt: {
    needs: ['conversations'],
    toRow: (f, at) =>
      f.conversations === undefined
        ? chat.toRow(f, at)
        : { messages: messagesOf(f, 'conversations', sharegptKeys, at), ...toolsOf(f, at) },
  },
  alpaca,
  'alpaca-clean': alpaca,
  dolly: {
    needs: ['instruction', 'response'],
    toRow: (f, at) => ({
      instruction: text(f, 'instruction', at),
      input: optionalText(f, 'context', at),
      output: text(f, 'response', at),
    }),
  },
  'prompt-completion': pair('prompt', 'completion'),
  'self-instruct': pair('prompt', 'completion'),
  'input-output': inputOutput,
  longform: inputOutput,
  'hh-rlhf': pair(undefined, 'chosen'),
  text: { needs: ['text'], toRow: (f, at) => ({ text: text(f, 'text', at) }) },
  oasst1: pair(undefined, 'text'),
  chip2: {
    needs: ['text'],
    toRow: (f, at) => {
      const [prompt = '', ...answer] = text(f, 'text', at).split('\n<bot>: ');
      if (answer.length === 0)
        throw invalid(at, "text has no '\\n<bot>: ', which separates question and answer", f, ['text']);
      return { prompt: prompt.replace('<human>: ', ''), completion: answer.join('\n<bot>: ') };
    },
  },
  csv: table,
  tsv: table,
};

export function formatNames(): string[] {
  return Object.keys(FORMATS).filter((name) => name !== 'input_ids');
}

/** Every field that some format looks at. */
export const knownFields: ReadonlySet<string> = new Set([
  ...Object.values(FORMATS).flatMap(({ needs }) => needs),
  ...['input', 'context', 'labels', 'system', 'tools'],
]);

/**
 * The row that a record is. Without a format it is inferred from the record's fields; other fields are not looked at.
 * Throws ERR_QLORA_ROW_INVALID, which names the row, its file and line, the fields found and those expected, and
 * ERR_QLORA_DATASET_FORMAT for a format that does not exist.
 */
export function toRow(record: unknown, place: RowPlace, format?: string): Row {
  return formatOf(record, place, format).toRow(record as Fields, place);
}

/** The format of a record: the one that is named, else the first whose fields are all there. Throws as `toRow` does. */
export function formatOf(
  record: unknown,
  place: RowPlace,
  format?: string,
): { name: string; toRow: (record: unknown, place: RowPlace) => Row } {
  if (typeof record !== 'object' || record === null || Array.isArray(record)) {
    throw invalid(place, `it must be an object, it is ${kindOf(record)}`);
  }
  const name = format ?? inferFormat(record as Fields, place);
  const { toRow } = rowFormat(name);
  return { name, toRow: (fields, at) => toRow(fields as Fields, at) };
}

/** Checks the name alone, so that a wrong one fails before a file is opened. */
export function checkFormat(format: string | undefined): void {
  if (format !== undefined) rowFormat(format);
}

function rowFormat(name: string): RowFormat {
  const format = Object.hasOwn(FORMATS, name) ? FORMATS[name] : undefined;
  if (format) return format;
  const near = didYouMean(name, formatNames());
  throw new QLoRAError(
    'ERR_QLORA_DATASET_FORMAT',
    `There is no data format '${name}', only ${formatNames().join(', ')}`,
    {
      hint: near === undefined ? 'Leave it out to have it inferred from the fields.' : `Did you mean '${near}'?`,
      detail: { format: name, known: formatNames() },
    },
  );
}

function inferFormat(fields: Fields, place: RowPlace): string {
  for (const [name, { needs }] of Object.entries(FORMATS)) {
    if (needs.every((field) => fields[field] !== undefined)) return name;
  }
  const hint = renaming(Object.keys(fields));
  const begun = Object.values(FORMATS).find(({ needs: [first = ''] }) => fields[first] !== undefined);
  if (begun) {
    const missing = begun.needs.find((field) => fields[field] === undefined);
    throw invalid(place, `${missing} is missing`, fields, [begun.needs.join(' + ')], hint);
  }
  const known = [...new Set(Object.values(FORMATS).map((format) => format.needs.join(' + ')))];
  throw invalid(place, 'its fields are none that are known', fields, known, hint);
}

/** How others call what is asked, and what is answered. */
const questionNames = /^(instruction|question|query|prompt|input|user|human)s?$/i;
const answerNames = /^(output|answer|response|reply|completion|target|assistant)s?$/i;

/** A hint for a row that has both under other names. */
function renaming(names: readonly string[]): string | undefined {
  const question = names.find((name) => questionNames.test(name));
  const answer = names.find((name) => answerNames.test(name));
  if (question === undefined || answer === undefined) return undefined;
  const renamed = [
    [question, 'instruction'],
    [answer, 'output'],
  ].filter(([from, to]) => from !== to);
  return `Rename ${renamed.map(([from, to]) => `${from} to ${to}`).join(' and ')}.`;
}

function pair(prompt: string | undefined, completion: string): RowFormat {
  return {
    needs: prompt === undefined ? [completion] : [prompt, completion],
    toRow: (f, at) => ({
      prompt: prompt === undefined ? '' : text(f, prompt, at),
      completion: text(f, completion, at),
    }),
  };
}

const MAX_ID = 2 ** 31 - 1;

function idsRow(ids: unknown, labels: unknown, place: RowPlace): Row {
  const list = checkIds(ids, 'inputIds', 0, place);
  if (list.length === 0) throw invalid(place, 'inputIds is empty');
  if (labels == null) return { inputIds: list };
  const marked = checkIds(labels, 'labels', -100, place);
  if (marked.length !== list.length) {
    throw invalid(place, `labels has ${marked.length} entries and inputIds ${list.length}; they must be as many`);
  }
  return { inputIds: list, labels: marked };
}

/** Ids from 0, where `other` is one more that may stand (-100 marks what is not trained). */
function checkIds(value: unknown, name: string, other: number, place: RowPlace): ArrayLike<number> {
  const isList = Array.isArray(value) || (ArrayBuffer.isView(value) && !(value instanceof DataView));
  if (!isList) throw invalid(place, `${name} must be a list of token ids, it is ${kindOf(value)}`);
  const list = value as unknown as ArrayLike<unknown>;
  for (let i = 0; i < list.length; i++) {
    const id = list[i];
    const fits = typeof id === 'number' && Number.isInteger(id) && (id === other || (id >= 0 && id <= MAX_ID));
    if (!fits)
      throw invalid(place, `${name}[${i}] must be a token id${other < 0 ? ` or ${other}` : ''}, it is ${String(id)}`);
  }
  return list as ArrayLike<number>;
}
