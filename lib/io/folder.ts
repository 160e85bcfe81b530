import { mkdir, open, stat } from 'node:fs/promises';
import { dirname } from 'node:path';
import { QLoRAError } from '../errors.js';

/** What a failed call on the disk becomes. `what` completes 'cannot ...'. */
function diskError(path: string, what: string, cause: unknown): QLoRAError {
  const { code, message } = cause as NodeJS.ErrnoException;
  const full = code === 'ENOSPC' || code === 'EDQUOT';
  return new QLoRAError(
    full ? 'ERR_QLORA_DISK_FULL' : 'ERR_QLORA_WRITE_FAILED',
    `${path}: cannot ${what}: ${message}`,
    {
      hint: full ? 'Free space on this disk or write elsewhere.' : 'Check the path and the permissions.',
      cause,
    },
  );
}

/** Runs a call on the disk. @throws ERR_QLORA_DISK_FULL, ERR_QLORA_WRITE_FAILED */
export async function onDisk<T>(path: string, what: string, call: () => Promise<T>): Promise<T> {
  try {
    return await call();
  } catch (error) {
    throw diskError(path, what, error);
  }
}

/** Makes the folder, and those above it, where they are not there yet. @throws ERR_QLORA_DISK_FULL, ERR_QLORA_WRITE_FAILED */
export async function makeFolder(path: string): Promise<void> {
  await onDisk(path, 'make this folder', () => makeMissing(path));
}

/** mkdir's `recursive` never ends where a folder that is there answers a new name with ENOENT, as /proc does. */
async function makeMissing(path: string): Promise<void> {
  const isFolder = () =>
    stat(path).then(
      (status) => status.isDirectory(),
      () => false,
    );
  if (await isFolder()) return;
  const above = dirname(path);
  if (above !== path) await makeMissing(above);
  await mkdir(path).catch(async (error) => {
    if (!(await isFolder())) throw error; // else another process made it meanwhile
  });
}

/** Makes the names in a folder outlive a power cut. @throws ERR_QLORA_DISK_FULL, ERR_QLORA_WRITE_FAILED */
export async function syncFolder(path: string): Promise<void> {
  await onDisk(path, 'sync this folder', async () => {
    await using folder = await open(path, 'r');
    // Some network file systems cannot sync a folder and say so by EINVAL.
    await folder.sync().catch((error: NodeJS.ErrnoException) => {
      if (error.code !== 'EINVAL') throw error;
    });
  });
}
