/** The fields of a record of a data set, with errors that say where it stands and what was expected. */
import { QLoRAError } from '../errors.js';

/** Where a row comes from, for messages. `row` and `line` count from 1. */
export interface RowPlace {
  row: number;
  file?: string;
  line?: number;
}

export type Fields = Readonly<Record<string, unknown>>;

export function text(fields: Fields, name: string, place: RowPlace): string {
  const value = fields[name];
  if (typeof value === 'string') return value;
  throw invalid(place, `${name} must be a string, it is ${kindOf(value)}`, fields, [name]);
}

export function optionalText(fields: Fields, name: string, place: RowPlace): string | undefined {
  return fields[name] == null ? undefined : text(fields, name, place);
}

/** 'row 3 of data.jsonl (line 4)'. */
export function describePlace({ row, file, line }: RowPlace): string {
  return `row ${row}${file === undefined ? '' : ` of ${file}`}${line === undefined ? '' : ` (line ${line})`}`;
}

export function invalid(
  place: RowPlace,
  what: string,
  fields?: Fields,
  expected?: readonly string[],
  hint = 'Rename the fields, or choose a datasetFormat.',
): QLoRAError {
  const found = fields === undefined ? undefined : Object.keys(fields).slice(0, 20);
  const shape = found === undefined ? '' : `; fields found: ${found.map(short).join(', ') || 'none'}`;
  const wanted = expected === undefined ? '' : `; expected: ${expected.join(', or ')}`;
  return new QLoRAError(
    'ERR_QLORA_ROW_INVALID',
    `${capital(describePlace(place))} cannot be used: ${what}${shape}${wanted}`,
    {
      hint,
      detail: { ...place, found, expected },
    },
  );
}

/** Names come from strangers. */
function short(name: string): string {
  return name.length > 80 ? `${name.slice(0, 77)}...` : name;
}

export function capital(sentence: string): string {
  return sentence.charAt(0).toUpperCase() + sentence.slice(1);
}

export function kindOf(value: unknown): string {
  if (value === undefined) return 'missing';
  if (value === null) return 'null';
  if (Array.isArray(value)) return value.length === 0 ? 'an empty list' : 'a list';
  return typeof value === 'object' ? 'an object' : `a ${typeof value}`;
}
