/** What a bench is, and how its measurements are printed: a table for people, or one JSON object a line. */

/** Of the command line, as parseArgs takes them. */
export type Options = Readonly<Record<string, { type: 'string' | 'boolean'; default?: string | boolean }>>;
type Value<T> = T extends 'string' ? string : boolean;
/** An option without a default may be missing. */
export type Values<O extends Options> = {
  [K in keyof O]: O[K] extends { default: unknown } ? Value<O[K]['type']> : Value<O[K]['type']> | undefined;
};
/** One measurement. Rates and shares are plain numbers, sizes bytes. */
export type Measurement = Readonly<Record<string, unknown>>;

export interface Column {
  title: string;
  /** At least; the title's own length where that is more. */
  width: number;
  text: (m: Measurement) => string;
}

export interface Bench<O extends Options = Options> {
  name: string;
  /** Stands above the table. */
  about: string;
  /** Besides --json. */
  options: O;
  columns: readonly Column[];
  /** Measures, and passes on each measurement as soon as it is made, without the fields that every bench has. */
  run(values: Values<O>, emit: (m: Measurement) => void): Promise<void>;
}

/** Keeps the types of the options between their description and `run`. */
export function defineBench<const O extends Options>(bench: Bench<O>): Bench {
  return bench as unknown as Bench;
}

/** A column of the field itself, as text or as a number with so many decimals. */
export function column(title: string, width: number, field: string, decimals?: number): Column {
  return {
    title,
    width,
    text: (m) => {
      const value = m[field];
      if (value === undefined) return '-';
      return typeof value === 'number' && decimals !== undefined ? value.toFixed(decimals) : String(value);
    },
  };
}

export function percent(title: string, field: string): Column {
  return {
    title,
    width: 7,
    text: (m) => (typeof m[field] === 'number' ? `${((m[field] as number) * 100).toFixed(1)}%` : '-'),
  };
}

export function megabytes(title: string, field: string): Column {
  return { title, width: 9, text: (m) => `${Math.round((m[field] as number) / 1e6)} MB` };
}

const line = (cells: readonly string[], columns: readonly Column[]) =>
  cells.map((cell, i) => cell.padStart(Math.max(columns[i]?.width ?? 0, columns[i]?.title.length ?? 0))).join('  ');

/** Prints measurements as they come; `fields` are those that all of them share. */
export function printer(
  bench: Pick<Bench, 'name' | 'about' | 'columns'>,
  fields: Measurement,
  format: 'json' | 'table',
): (m: Measurement) => void {
  if (format === 'json') return (m) => console.log(JSON.stringify({ bench: bench.name, ...fields, ...m }));
  let head = `\n${bench.name}: ${bench.about}\n`;
  head += line(
    bench.columns.map(({ title }) => title),
    bench.columns,
  );
  return (m) => {
    if (head) console.log(head);
    head = '';
    console.log(
      line(
        bench.columns.map(({ text }) => text({ ...fields, ...m })),
        bench.columns,
      ),
    );
  };
}

/** A number as it is worth printing: five figures. */
export const rounded = (x: number) => Number(x.toPrecision(5));

/** @throws where an option's value is not a whole number above 0 */
export function count(name: string, value: string): number {
  const n = Number(value);
  if (!Number.isSafeInteger(n) || n < 1) throw new Error(`--${name} must be a whole number above 0, got '${value}'`);
  return n;
}

/** @throws where an option's value is not a number from 0 on */
export function amount(name: string, value: string): number {
  const x = Number(value);
  if (!Number.isFinite(x) || x < 0) throw new Error(`--${name} must be a number from 0 on, got '${value}'`);
  return x;
}

/** Several, with commas. */
export const counts = (name: string, value: string) => value.split(',').map((part) => count(name, part));

/** @throws where an option's value is none of those named */
export function choice<T extends string>(name: string, value: string, among: readonly T[]): T {
  if (!among.includes(value as T)) throw new Error(`--${name} must be one of ${among.join(', ')}, got '${value}'`);
  return value as T;
}
