/** JSON files from strangers: bounded in size, with errors that name the file, the field and what was expected. */
import { constants } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import { QLoRAError } from '../errors.js';

export type JsonObject = { readonly [key: string]: unknown };

/** Enough for config.json and its kin; an index of a model with 100,000 tensors takes 10 MB. */
const defaultMaxJsonBytes = 64 * 2 ** 20;

export function isObject(value: unknown): value is JsonObject {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/**
 * The text of a UTF-8 file of at most `maxBytes` bytes.
 *
 * @throws ERR_QLORA_FILE_NOT_FOUND, ERR_QLORA_READ_FAILED, ERR_QLORA_FILE_TOO_LARGE, ERR_QLORA_JSON (no UTF-8)
 */
export async function readText(path: string, maxBytes = defaultMaxJsonBytes): Promise<string> {
  let file: FileHandle | undefined;
  try {
    // Without O_NONBLOCK, opening a named pipe would wait for its writer.
    file = await open(path, constants.O_RDONLY | constants.O_NONBLOCK);
    const status = await file.stat();
    if (!status.isFile())
      throw new QLoRAError('ERR_QLORA_READ_FAILED', `${path}: it is no regular file`, { hint: 'Check the path.' });
    if (status.size > maxBytes) {
      throw new QLoRAError(
        'ERR_QLORA_FILE_TOO_LARGE',
        `${path} has ${status.size} bytes, at most ${maxBytes} are read`,
        {
          hint: 'Check that this is the right file.',
        },
      );
    }
    const bytes = Buffer.alloc(status.size);
    let length = 0;
    while (length < bytes.length) {
      const { bytesRead } = await file.read(bytes, length, bytes.length - length, length);
      if (bytesRead === 0) break;
      length += bytesRead;
    }
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes.subarray(0, length));
  } catch (cause) {
    if (cause instanceof QLoRAError) throw cause;
    const { code, message } = cause as NodeJS.ErrnoException;
    if (code === 'ENOENT' || code === 'ENOTDIR') {
      throw new QLoRAError('ERR_QLORA_FILE_NOT_FOUND', `${path}: there is no such file`, {
        hint: 'Check the path.',
        cause,
      });
    }
    if (code === 'ERR_ENCODING_INVALID_ENCODED_DATA') {
      throw new QLoRAError('ERR_QLORA_JSON', `${path}: it is not valid UTF-8`, { hint: 'Store it as UTF-8.', cause });
    }
    throw new QLoRAError('ERR_QLORA_READ_FAILED', `${path}: cannot read it: ${message}`, {
      hint: 'Check the disk and the permissions.',
      cause,
    });
  } finally {
    await file?.close();
  }
}

/** @throws ERR_QLORA_JSON and what readText throws */
export async function readJson(path: string, maxBytes = defaultMaxJsonBytes): Promise<unknown> {
  const text = await readText(path, maxBytes);
  try {
    return JSON.parse(text);
  } catch (cause) {
    const { message } = cause as SyntaxError;
    const python = /(?<![\w"])(-?Infinity|NaN)(?![\w"])/.exec(text);
    throw new QLoRAError('ERR_QLORA_JSON', `${path}: ${message}${place(text, message)}`, {
      hint: python ? `JSON has no ${python[1]}: write a number or null.` : 'The file is damaged or cut short.',
      cause,
    });
  }
}

/** @throws ERR_QLORA_JSON and what readJson throws */
export async function readJsonObject(path: string, maxBytes = defaultMaxJsonBytes): Promise<JsonObject> {
  const value = await readJson(path, maxBytes);
  if (!isObject(value)) {
    throw new QLoRAError('ERR_QLORA_JSON', `${path}: expected an object, got ${show(value)}`, {
      hint: 'Check that this is the right file.',
    });
  }
  return value;
}

/** Line and column of the position that V8 names, where its message does not have them. */
function place(text: string, message: string): string {
  const position = /at position (\d+)$/.exec(message)?.[1];
  if (position === undefined) return '';
  const before = text.slice(0, Number(position)).split('\n');
  return ` (line ${before.length}, column ${(before.at(-1) as string).length + 1})`;
}

/** A value for a message: at most some 80 characters. */
export function show(value: unknown): string {
  const text = JSON.stringify(value) ?? String(value);
  return text.length > 80 ? `${text.slice(0, 77)}...` : text;
}

/**
 * Typed access to the fields of an object that came from a file. A field that is missing or null is undefined; one of
 * another type is an error (ERR_QLORA_CONFIG_INVALID) that names file, field, what was expected and what came.
 */
export class Fields {
  constructor(
    readonly path: string,
    readonly object: JsonObject,
  ) {}

  raw(key: string): unknown {
    return Object.hasOwn(this.object, key) ? (this.object[key] ?? undefined) : undefined;
  }

  fail(key: string, expected: string): never {
    throw new QLoRAError(
      'ERR_QLORA_CONFIG_INVALID',
      `${this.path}: '${key}' must be ${expected}, got ${show(this.raw(key))}`,
      {
        hint: `Correct '${key}' in this file.`,
        detail: { path: this.path, key },
      },
    );
  }

  string(key: string): string | undefined {
    return this.typed(key, 'a string', (v): v is string => typeof v === 'string');
  }

  boolean(key: string): boolean | undefined {
    return this.typed(key, 'true or false', (v): v is boolean => typeof v === 'boolean');
  }

  number(key: string): number | undefined {
    return this.typed(key, 'a finite number', isFiniteNumber);
  }

  /** A non-negative integer. */
  count(key: string): number | undefined {
    return this.typed(key, 'a non-negative integer', isCount);
  }

  /** One non-negative integer or several. */
  counts(key: string): number[] | undefined {
    return this.list(key, 'a non-negative integer or a list of them', isCount);
  }

  /** One string or several. */
  strings(key: string): string[] | undefined {
    return this.list(key, 'a string or a list of strings', (v): v is string => typeof v === 'string');
  }

  /** An object whose values are all finite numbers. */
  numbersByName(key: string): Record<string, number> | undefined {
    const isNumbers = (v: unknown): v is Record<string, number> =>
      isObject(v) && Object.values(v).every(isFiniteNumber);
    return this.typed(key, 'an object of numbers', isNumbers);
  }

  private typed<T>(key: string, expected: string, is: (value: unknown) => value is T): T | undefined {
    const value = this.raw(key);
    return value === undefined || is(value) ? value : this.fail(key, expected);
  }

  private list<T>(key: string, expected: string, is: (value: unknown) => value is T): T[] | undefined {
    const value = this.raw(key);
    if (value === undefined) return undefined;
    const list = Array.isArray(value) ? value : [value];
    return list.every(is) ? list : this.fail(key, expected);
  }
}

function isFiniteNumber(value: unknown): value is number {
  return Number.isFinite(value);
}

function isCount(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}
