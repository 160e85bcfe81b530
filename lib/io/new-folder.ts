/** Folders that are there whole or not at all. */
import { open, readdir, rename, rm } from 'node:fs/promises';
import { dirname, resolve } from 'node:path';
import { QLoRAError } from '../errors.js';
import { removeTemporaryFiles, temporaryPath } from './atomic-file.js';
import { makeFolder } from './folder.js';

/** What a failed call of the file system becomes; errors of our own stay as they are. */
export function writeFailed(path: string, what: string, cause: unknown): unknown {
  const { code, message, syscall } = cause as NodeJS.ErrnoException;
  if (cause instanceof QLoRAError || syscall === undefined) return cause;
  const full = code === 'ENOSPC' || code === 'EDQUOT';
  return new QLoRAError(full ? 'ERR_QLORA_DISK_FULL' : 'ERR_QLORA_WRITE_FAILED', `${path}: ${what}: ${message}`, {
    hint: full ? 'Free space on this disk or write elsewhere.' : 'Check the path and the permissions.',
    cause,
  });
}

/** @throws ERR_QLORA_OUTPUT_EXISTS where the folder holds something already, or is a file */
export async function refuseFilled(directory: string): Promise<void> {
  const names = await readdir(directory).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return [];
    if (error.code === 'ENOTDIR') return ['a file'];
    throw writeFailed(directory, 'cannot look into this folder', error);
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
 * A new folder that is there whole or not at all: `fill` writes its files, each synced, into a temporary folder beside
 * it, which takes its name at the end. Where `fill` fails, or anything after it, nothing is left.
 *
 * @throws ERR_QLORA_OUTPUT_EXISTS, ERR_QLORA_DISK_FULL, ERR_QLORA_WRITE_FAILED, and what `fill` throws
 */
export async function writeNewFolder<T>(directory: string, fill: (temporary: string) => Promise<T>): Promise<T> {
  const target = resolve(directory);
  await refuseFilled(target);
  await makeFolder(dirname(target));
  await removeTemporaryFiles(dirname(target));
  const temporary = temporaryPath(target);
  await makeFolder(temporary);
  try {
    const result = await fill(temporary);
    await syncFolder(temporary);
    await refuseFilled(target);
    await rename(temporary, target); // over an empty folder too
    await syncFolder(dirname(target));
    return result;
  } catch (error) {
    await rm(temporary, { recursive: true, force: true });
    throw writeFailed(directory, 'cannot write this folder', error);
  }
}

async function syncFolder(path: string): Promise<void> {
  const handle = await open(path);
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}
