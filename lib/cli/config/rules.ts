/** What a key of a configuration is to us: tables of these are all that is known of other programs' names. */
import { z } from 'zod';

/** A key that sets one of our options. */
export interface Mapped {
  kind: 'maps';
  /** Path of our option, as 'lora.r'; '@name' is a value that resolve.ts puts together with others. */
  to: string;
  /** What may stand there; the trainer's own schema checks ranges. */
  takes: z.ZodType;
  /** Their value as ours; undefined where it asks for nothing. */
  convert: (value: unknown) => unknown;
  /** For the table in docs/cli.md, and for --help. */
  note: string;
}

/** A key whose only meaning here is what happens anyway. */
export interface Agreed {
  kind: 'agrees';
  takes: z.ZodType;
  note: string;
}

/** A key that cannot be honoured. */
export interface Refused {
  kind: 'refuses';
  note: string;
}

export type Rule = Mapped | Agreed | Refused;
export type Rules = Readonly<Record<string, Rule>>;

const same = (value: unknown) => value;

export function maps(to: string, takes: z.ZodType, note = '', convert: (value: unknown) => unknown = same): Mapped {
  return { kind: 'maps', to, takes, convert, note };
}

export function agrees(takes: z.ZodType, note: string): Agreed {
  return { kind: 'agrees', takes, note };
}

export function refuses(note: string): Refused {
  return { kind: 'refuses', note };
}

export const text = z.string();
export const number = z.number();
export const whole = z.int();
export const boolean = z.boolean();
export const nothing = z.null();
const listOfText = z.array(text);
/** A list, or one string with commas, as on a command line. */
export const list = z.union([text, listOfText]);

export function splitList(value: unknown): string[] {
  const parts = typeof value === 'string' ? value.split(',') : (value as string[]);
  return parts.map((part) => part.trim()).filter((part) => part !== '');
}

/** true asks for `then`, false for nothing. */
export function whenTrue(then: unknown): (value: unknown) => unknown {
  return (value) => (value ? then : undefined);
}

/** Numbers that are 0 or less ask for nothing, as Hugging Face's max_steps: -1 does. */
export function ifPositive(value: unknown): unknown {
  return (value as number) > 0 ? value : undefined;
}

/** 'all', a list of names, one name, or a regular expression between slashes. */
export function modules(value: unknown): unknown {
  if (value === 'all' || value === 'all-linear') return 'all-linear';
  if (typeof value === 'string' && /^\/.*\/$/s.test(value)) return value;
  return splitList(value);
}

/** A value by its name there; `names` has ours. */
export function byName(names: Readonly<Record<string, unknown>>): (value: unknown) => unknown {
  return (value) => names[value as string];
}

/** zod's enum of the names of a table. */
export function oneOf(names: Readonly<Record<string, unknown>>): z.ZodType {
  return z.enum(Object.keys(names) as [string, ...string[]]);
}

const units: Readonly<Record<string, number>> = {
  '': 1, B: 1, kB: 1e3, KB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30, TiB: 2 ** 40,
}; // biome-ignore format: a table
const size = /^\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*$/;

/** Bytes as a number, or as text with a unit: 24GB, 512MiB. */
export const bytes = z.union([
  number,
  text.refine((value) => units[size.exec(value)?.[2] ?? 'no'] !== undefined, 'bytes, as 24GB, 512MiB or a number'),
]);

export function toBytes(value: unknown): number {
  if (typeof value === 'number') return value;
  const [, amount = '', unit = ''] = size.exec(value as string) ?? [];
  return Math.floor(Number(amount) * (units[unit] ?? Number.NaN));
}
