/** Folders that were not there before, and are there whole or not at all. */
import { readdir, rm } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { QLoRAError } from '../errors.js';
import { writeFolder } from './atomic-folder.js';
import { makeFolder, onDisk } from './folder.js';

/** @throws ERR_QLORA_OUTPUT_EXISTS where it is there and not empty */
export async function refuseFilled(directory: string): Promise<void> {
  const names = await readdir(directory).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return [];
    if (error.code === 'ENOTDIR') return ['a file'];
    throw error;
  });
  if (names.length === 0) return;
  throw new QLoRAError(
    'ERR_QLORA_OUTPUT_EXISTS',
    `${directory} must be a new or an empty folder, it holds ${names[0]}`,
    {
      hint: 'Choose another folder, or remove this one.',
    },
  );
}

/**
 * writeFolder() for a folder that is not there, or empty.
 *
 * @returns what `fill` does
 * @throws ERR_QLORA_OUTPUT_EXISTS and what writeFolder() throws
 */
export async function writeNewFolder<T>(directory: string, fill: (temporary: string) => Promise<T>): Promise<T> {
  const target = resolve(directory);
  await refuseFilled(target);
  const parent = dirname(target);
  await makeFolder(parent);
  // What a process that was killed while it wrote this folder left.
  for (const name of await readdir(parent)) {
    const path = join(parent, name);
    if (!name.startsWith(`.${basename(target)}.`) || !/\.[0-9a-f]{16}\.tmp$/.test(name)) continue;
    await onDisk(path, 'remove it', () => rm(path, { recursive: true, force: true }));
  }
  const results: T[] = [];
  await writeFolder(target, async (temporary) => {
    results.push(await fill(temporary));
    await refuseFilled(target);
  });
  return results[0] as T;
}
