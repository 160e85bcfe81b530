/** Files of which a reader sees the old one or the whole new one, whatever happens while they are written. */
import { randomBytes } from 'node:crypto';
import { readdir, rm, stat } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { guard, type NativeTensor } from '../native.js';
import { nativeFile } from './native-file.js';

/** Of files, and of the folders that replaceFiles() fills. */
const temporaryName = /^(\..*\.[0-9a-f]{16}\.qlora-tmp|\.(saving|replaced)\.[0-9a-f]{16}\.tmp)$/;

/**
 * Writes `parts`, one after the other, to a temporary file beside `path`, syncs it, renames it to `path` and syncs the
 * folder. Typed arrays may not change until the promise is settled.
 *
 * @throws ERR_QLORA_DISK_FULL, ERR_QLORA_WRITE_FAILED: an earlier file is as it was and the temporary one is gone.
 */
export async function writeParts(path: string, parts: readonly (NativeTensor | ArrayBufferView)[]): Promise<void> {
  const target = resolve(path);
  const temporary = join(
    dirname(target),
    `.${basename(target).slice(0, 100)}.${randomBytes(8).toString('hex')}.qlora-tmp`,
  );
  await guard(() => nativeFile.writeFile(target, temporary, parts));
}

/** The same for a text, as UTF-8, or for bytes. */
export function writeFileAtomic(path: string, content: string | Uint8Array): Promise<void> {
  return writeParts(path, [typeof content === 'string' ? new TextEncoder().encode(content) : content]);
}

/** Milliseconds after which a temporary file is no save under way any more. */
const abandoned = 3_600_000;

/** Removes what a killed process left half-written in a folder, once it is an hour old. */
export async function removeTemporaryFiles(directory: string): Promise<void> {
  for (const name of await readdir(directory)) {
    if (!temporaryName.test(name)) continue;
    const path = join(directory, name);
    const { mtimeMs } = await stat(path).catch(() => ({ mtimeMs: Date.now() }));
    if (Date.now() - mtimeMs > abandoned) await rm(path, { recursive: true, force: true });
  }
}
