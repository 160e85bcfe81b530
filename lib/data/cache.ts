/** Encoded rows on disk, under a key of what they were made from. */
import { createHash, type Hash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { type FileHandle, open, readdir, readFile, rename, rm, stat, utimes } from 'node:fs/promises';
import { homedir, tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { removeTemporaryFiles } from '../io/atomic-file.js';
import { makeFolder, syncFolder } from '../io/folder.js';
import { log } from '../logger.js';
import { unreadable } from './data-errors.js';
import { columns, wordsOf } from './encoded-chunk.js';
import { bytesOf, EncodedRows, type RowSink, readWhole, temporaryFile, writeWhole } from './encoded-rows.js';

const hashBytes = 32;
/** Behind the words: the index, the description as JSON, its length, SHA-256 of all before. */
const tailBytes = 4 + hashBytes;
/** Milliseconds after which rows that nobody used are removed. */
const forgotten = 30 * 24 * 3_600_000;

/** What a cached file says of itself. */
interface Description {
  rows: number;
  words: number;
  /** Rows that the source has, used or not. */
  total: number;
}

export interface CachedRows {
  rows: EncodedRows;
  total: number;
}

/** QLORA_CACHE, else the user's cache; undefined where QLORA_CACHE is 'off'. */
export function cacheFolder(env: NodeJS.ProcessEnv = process.env): string | undefined {
  if (env.QLORA_CACHE === 'off') return undefined;
  if (env.QLORA_CACHE) return env.QLORA_CACHE;
  const base = env.XDG_CACHE_HOME || (process.platform === 'win32' ? env.LOCALAPPDATA : undefined);
  return join(base || join(homedir(), '.cache'), 'qlora-node');
}

/** Where rows go that memory should not hold. */
export async function spillFolder(): Promise<string> {
  const folder = cacheFolder();
  if (folder === undefined) return tmpdir();
  try {
    await makeFolder(folder);
    return folder;
  } catch {
    return tmpdir();
  }
}

/**
 * The key of rows: SHA-256 over the data files' bytes, the tokenizer's files, what else decides about the result, and
 * the code that encodes.
 */
export async function cacheKey(
  files: readonly string[],
  directory: string | undefined,
  options: object,
): Promise<string> {
  const hash = createHash('sha256');
  hash.update(`${JSON.stringify(options)}\n${await codeHash()}\n`);
  for (const file of await tokenizerFiles(directory)) await hashFile(hash, file.path, file.name);
  for (const [i, file] of files.entries()) await hashFile(hash, file, `data ${i}`);
  return hash.digest('hex');
}

/** A file's length stands behind its bytes, so that no two lists of files give the same bytes. */
async function hashFile(hash: Hash, path: string, name: string): Promise<void> {
  let length = 0;
  hash.update(`${name}\n`);
  try {
    for await (const chunk of createReadStream(path, { highWaterMark: 2 ** 18 }) as AsyncIterable<Buffer>) {
      hash.update(chunk);
      length += chunk.length;
    }
  } catch (error) {
    throw unreadable(path, error as NodeJS.ErrnoException);
  }
  hash.update(`\n${length}\n`);
}

async function tokenizerFiles(directory: string | undefined): Promise<{ path: string; name: string }[]> {
  if (directory === undefined) return [];
  const names = ['tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja'];
  const more = 'additional_chat_templates';
  const there = new Set(await readdir(directory));
  const templates = there.has(more)
    ? (await readdir(join(directory, more))).sort().map((name) => join(more, name))
    : [];
  return [...names.filter((name) => there.has(name)), ...templates].map((name) => ({
    name,
    path: join(directory, name),
  }));
}

let ownCode: Promise<string> | undefined;

/** Of the modules that decide how a row becomes tokens: in a checkout the version alone would not change with them. */
function codeHash(): Promise<string> {
  ownCode ??= (async () => {
    const hash = createHash('sha256');
    const here = dirname(fileURLToPath(import.meta.url));
    for (const folder of [here, join(here, '..', 'tokenizer')]) {
      for (const name of (await readdir(folder)).filter((n) => n.endsWith('.js')).sort()) {
        hash.update(name).update(await readFile(join(folder, name)));
      }
    }
    return hash.digest('hex');
  })();
  return ownCode;
}

/** The rows under a key, verified; undefined where there are none, or they are damaged. */
export async function openCached(folder: string, key: string, memoryBytes: number): Promise<CachedRows | undefined> {
  const path = join(folder, `${key}.rows`);
  let file: FileHandle | undefined;
  try {
    file = await open(path);
    await utimes(path, new Date(), new Date()).catch(() => {});
    const { size } = await file.stat();
    await verify(file, size);
    const tail = Buffer.alloc(tailBytes);
    await readWhole(file, tail, size - tailBytes);
    const length = tail.readUInt32LE(0);
    const json = Buffer.alloc(Math.min(length, size));
    await readWhole(file, json, size - tailBytes - length);
    const { rows, words, total } = JSON.parse(json.toString()) as Description;
    if ((words + rows * columns) * 4 + length + tailBytes !== size)
      throw new Error('its lengths contradict each other');
    const index = new Int32Array(rows * columns);
    await readWhole(file, bytesOf(index), words * 4);
    checkIndex(index, words);
    if (words * 4 > memoryBytes) return { rows: new EncodedRows(index, { file }), total };
    const memory = new Int32Array(words);
    await readWhole(file, bytesOf(memory), 0);
    await file.close();
    return { rows: new EncodedRows(index, { memory }), total };
  } catch (error) {
    await file?.close();
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    log('warn', `the cached rows in ${path} cannot be used and are made again: ${(error as Error).message}`);
    await rm(path, { force: true }).catch(() => {});
    return undefined;
  }
}

async function verify(file: FileHandle, size: number): Promise<void> {
  if (size < tailBytes) throw new Error('it is cut short');
  const hash = createHash('sha256');
  await hashStart(file, size - hashBytes, hash);
  const stored = Buffer.alloc(hashBytes);
  await readWhole(file, stored, size - hashBytes);
  if (!stored.equals(hash.digest())) throw new Error('its checksum does not match');
}

function checkIndex(index: Int32Array, words: number): void {
  let sum = 0;
  for (let at = 0; at < index.length; at += columns) {
    const tokens = index[at] as number;
    if (tokens < 0) throw new Error('its index is damaged');
    sum += wordsOf(tokens, index[at + columns - 1] as number);
  }
  if (sum !== words) throw new Error('its index does not match');
}

/**
 * Writes what a sink holds under a key: to a temporary file that is synced and renamed. Where that fails the rows are
 * as good as before, and the log says why they were not kept.
 */
export async function writeCached(folder: string, key: string, sink: RowSink, total: number): Promise<void> {
  let file = sink.file;
  const path = join(folder, `${key}.rows`);
  try {
    await makeFolder(folder);
    await removeTemporaryFiles(folder);
    await removeForgotten(folder);
    const hash = createHash('sha256');
    if (file) await hashStart(file.handle, sink.size, hash);
    else file = await temporaryFile(folder);
    const description: Description = { rows: sink.rows, words: sink.size / 4, total };
    const json = Buffer.from(JSON.stringify(description));
    const length = Buffer.alloc(4);
    length.writeUInt32LE(json.length);
    for (const part of [...sink.parts.map(bytesOf), bytesOf(sink.index), json, length]) {
      hash.update(part);
      await writeWhole(file.handle, part);
    }
    await writeWhole(file.handle, hash.digest());
    await file.handle.sync();
    await rename(file.path, path);
    await syncFolder(folder);
  } catch (error) {
    log('warn', `encoded rows were not kept in ${folder}: ${(error as Error).message}`);
    if (file && file !== sink.file) await rm(file.path, { force: true }).catch(() => {});
  } finally {
    if (file && file !== sink.file) await file.handle.close();
  }
}

async function hashStart(file: FileHandle, size: number, hash: Hash): Promise<void> {
  const chunk = Buffer.alloc(2 ** 20);
  for (let at = 0; at < size; at += chunk.length) {
    const part = chunk.subarray(0, Math.min(chunk.length, size - at));
    await readWhole(file, part, at);
    hash.update(part);
  }
}

/** The time of a file's change is that of its last use. */
async function removeForgotten(folder: string): Promise<void> {
  for (const name of await readdir(folder)) {
    if (!/^[0-9a-f]{64}\.rows$/.test(name)) continue;
    const path = join(folder, name);
    const { mtimeMs } = await stat(path).catch(() => ({ mtimeMs: Date.now() }));
    if (Date.now() - mtimeMs > forgotten) await rm(path, { force: true });
  }
}
