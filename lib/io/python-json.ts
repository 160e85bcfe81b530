/**
 * JSON exactly as Python's json.dumps writes it, for bytes that must equal what bitsandbytes, PEFT and transformers write:
 * ', ' and ': ' between items, only ASCII, floats in Python's shortest form (5.133e-05, 2.0).
 */

/** A number that Python holds as a float: written with a point or an exponent. */
export class PythonFloat {
  constructor(readonly value: number) {}

  /** To JSON.stringify it is a number like any other. */
  toJSON(): number {
    return this.value;
  }
}

/** Python's repr of a float: the shortest digits that read back, an exponent below 1e-4 and from 1e16 on. */
export function pythonFloat(x: number): string {
  if (Number.isNaN(x)) return 'NaN';
  if (!Number.isFinite(x)) return x > 0 ? 'Infinity' : '-Infinity';
  const sign = x < 0 || Object.is(x, -0) ? '-' : '';
  const [mantissa, power] = Math.abs(x).toExponential().split('e') as [string, string];
  const exponent = Number(power);
  if (x !== 0 && (exponent < -4 || exponent >= 16)) {
    return `${sign}${mantissa}e${exponent < 0 ? '-' : '+'}${String(Math.abs(exponent)).padStart(2, '0')}`;
  }
  // Within these bounds JavaScript writes no exponent but below 1e-6, which the bounds exclude.
  const plain = String(Math.abs(x));
  return sign + (plain.includes('.') ? plain : `${plain}.0`);
}

/**
 * json.dumps(value), or json.dumps(value, indent=indent): keys in the order of the object; integers as they are, other
 * numbers as floats.
 */
export function pythonJson(value: unknown, indent?: number): string {
  return write(value, indent, '');
}

function write(value: unknown, indent: number | undefined, margin: string): string {
  if (value instanceof PythonFloat) return pythonFloat(value.value);
  if (typeof value === 'number') return Number.isSafeInteger(value) ? String(value) : pythonFloat(value);
  if (typeof value === 'string') return asciiString(value);
  if (typeof value === 'boolean' || value === null) return String(value);
  const inner = indent === undefined ? margin : margin + ' '.repeat(indent);
  const items = Array.isArray(value)
    ? value.map((v) => write(v, indent, inner))
    : Object.entries(value as object).map(([k, v]) => `${asciiString(k)}: ${write(v, indent, inner)}`);
  const [open, close] = Array.isArray(value) ? '[]' : '{}';
  if (items.length === 0) return `${open}${close}`;
  if (indent === undefined) return `${open}${items.join(', ')}${close}`;
  return `${open}\n${inner}${items.join(`,\n${inner}`)}\n${margin}${close}`;
}

function asciiString(text: string): string {
  return JSON.stringify(text).replace(/[\u007f-\uffff]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, '0')}`);
}

/** The object with its keys in order, at every depth, as sort_keys does. */
export function sortKeys(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(sortKeys);
  if (typeof value !== 'object' || value === null || value instanceof PythonFloat) return value;
  const entries = Object.entries(value).sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0));
  return Object.fromEntries(entries.map(([k, v]) => [k, sortKeys(v)]));
}
