import { mkdir } from 'node:fs/promises';
import { QLoRAError } from '../errors.js';

/** Makes the folder, and those above it, where they are not there yet. @throws ERR_QLORA_DISK_FULL, ERR_QLORA_WRITE_FAILED */
export async function makeFolder(path: string): Promise<void> {
  try {
    await mkdir(path, { recursive: true });
  } catch (cause) {
    const { code, message } = cause as NodeJS.ErrnoException;
    const full = code === 'ENOSPC' || code === 'EDQUOT';
    throw new QLoRAError(
      full ? 'ERR_QLORA_DISK_FULL' : 'ERR_QLORA_WRITE_FAILED',
      `${path}: cannot make this folder: ${message}`,
      {
        hint: full ? 'Free space on this disk or write elsewhere.' : 'Check the path and the permissions.',
        cause,
      },
    );
  }
}
