import { didYouMean, QLoRAError } from '../errors.js';

export type Role = 'system' | 'user' | 'assistant' | 'tool';
export interface Message {
  role: Role;
  content: string;
}

/** The shapes of a training example, as in the public API. */
export type Row =
  | { messages: Message[] }
  | { text: string }
  | { prompt: string; completion: string }
  | { instruction: string; input?: string; output: string }
  | { inputIds: ArrayLike<number>; labels?: ArrayLike<number> };

/** Where a row comes from, for messages. `row` and `line` count from 1. */
export interface RowPlace {
  row: number;
  file?: string;
  line?: number;
}

export interface LocatedRow {
  row: Row;
  place: RowPlace;
}

type Fields = Readonly<Record<string, unknown>>;
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
  toRow: (f, at) => ({ messages: messages(f, 'messages', { role: 'role', content: 'content' }, ROLES, at) }),
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
        : { messages: messages(f, 'conversations', { role: 'from', content: 'value' }, SHAREGPT_ROLES, at) },
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
  longform: pair('input', 'output'),
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
};

export function formatNames(): string[] {
  return Object.keys(FORMATS).filter((name) => name !== 'input_ids');
}

/**
 * The row that a record is. Without a format it is inferred from the record's fields; other fields are not looked at.
 * Throws ERR_QLORA_ROW_INVALID, which names the row, its file and line, the fields found and those expected, and
 * ERR_QLORA_DATASET_FORMAT for a format that does not exist.
 */
export function toRow(record: unknown, place: RowPlace, format?: string): Row {
  if (typeof record !== 'object' || record === null || Array.isArray(record)) {
    throw invalid(place, `it must be an object, it is ${kindOf(record)}`);
  }
  const fields = record as Fields;
  return (format === undefined ? inferFormat(fields, place) : rowFormat(format)).toRow(fields, place);
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

function inferFormat(fields: Fields, place: RowPlace): RowFormat {
  for (const format of Object.values(FORMATS)) {
    if (format.needs.every((field) => fields[field] !== undefined)) return format;
  }
  const known = [...new Set(Object.values(FORMATS).map((format) => format.needs.join(' + ')))];
  throw invalid(place, 'its fields are none that are known', fields, known);
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

function text(fields: Fields, name: string, place: RowPlace): string {
  const value = fields[name];
  if (typeof value === 'string') return value;
  throw invalid(place, `${name} must be a string, it is ${kindOf(value)}`, fields, [name]);
}

function optionalText(fields: Fields, name: string, place: RowPlace): string | undefined {
  return fields[name] == null ? undefined : text(fields, name, place);
}

const ROLES: Readonly<Record<string, Role>> = { system: 'system', user: 'user', assistant: 'assistant', tool: 'tool' };
const SHAREGPT_ROLES: Readonly<Record<string, Role>> = {
  ...ROLES,
  human: 'user',
  gpt: 'assistant',
  observation: 'tool',
};

function messages(
  fields: Fields,
  name: string,
  keys: { role: string; content: string },
  roles: Readonly<Record<string, Role>>,
  place: RowPlace,
): Message[] {
  const list = fields[name];
  if (!Array.isArray(list) || list.length === 0) {
    throw invalid(place, `${name} must be a list that is not empty, it is ${kindOf(list)}`, fields, [name]);
  }
  return list.map((entry: unknown, i) => {
    const message = (typeof entry === 'object' && entry !== null ? entry : {}) as Fields;
    const role = message[keys.role];
    const content = message[keys.content];
    const known = typeof role === 'string' && Object.hasOwn(roles, role) ? roles[role] : undefined;
    if (known === undefined) {
      const found = typeof role === 'string' ? `'${role}'` : kindOf(role);
      const expected = Object.keys(roles).join(', ');
      throw invalid(
        place,
        `${name}[${i}].${keys.role} must be one of ${expected}, it is ${found}`,
        message,
        Object.values(keys),
      );
    }
    if (typeof content !== 'string') {
      const what = `${name}[${i}].${keys.content} must be a string, it is ${kindOf(content)}`;
      throw invalid(place, what, message, Object.values(keys));
    }
    return { role: known, content };
  });
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

/** 'row 3 of data.jsonl (line 4)'. */
export function describePlace({ row, file, line }: RowPlace): string {
  return `row ${row}${file === undefined ? '' : ` of ${file}`}${line === undefined ? '' : ` (line ${line})`}`;
}

function invalid(place: RowPlace, what: string, fields?: Fields, expected?: readonly string[]): QLoRAError {
  const found = fields === undefined ? undefined : Object.keys(fields);
  const shape = found === undefined ? '' : `; fields found: ${found.slice(0, 20).join(', ') || 'none'}`;
  const wanted = expected === undefined ? '' : `; expected: ${expected.join(', or ')}`;
  return new QLoRAError(
    'ERR_QLORA_ROW_INVALID',
    `${capital(describePlace(place))} cannot be used: ${what}${shape}${wanted}`,
    {
      hint: 'Rename the fields, or choose a datasetFormat.',
      detail: { ...place, found, expected },
    },
  );
}

function capital(sentence: string): string {
  return sentence.charAt(0).toUpperCase() + sentence.slice(1);
}

function kindOf(value: unknown): string {
  if (value === undefined) return 'missing';
  if (value === null) return 'null';
  if (Array.isArray(value)) return value.length === 0 ? 'an empty list' : 'a list';
  return typeof value === 'object' ? 'an object' : `a ${typeof value}`;
}
