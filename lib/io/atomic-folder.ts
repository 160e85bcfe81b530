/** Folders of which a reader sees nothing, the old one or the whole new one, whatever happens while they are written. */
import { randomBytes } from 'node:crypto';
import { mkdir, readdir, readFile, rename, rm } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { onDisk, syncFolder } from './folder.js';

/** Of folders, and of the files of atomic-file.ts. */
const temporaryName = /^\..+\.[0-9a-f]{16}\.(qlora-)?tmp$/;

/** A name for what is not finished, in the folder of `path`. */
function temporaryBeside(path: string): string {
  return join(dirname(path), `.${basename(path).slice(0, 100)}.${randomBytes(8).toString('hex')}.tmp`);
}

const remove = (path: string) => rm(path, { recursive: true, force: true });

/**
 * Writes a folder: `write` fills a temporary one beside `path`, with files that it syncs; that one is synced, renamed to
 * `path`, and the folder above synced. An earlier `path` is replaced.
 *
 * @throws ERR_QLORA_DISK_FULL, ERR_QLORA_WRITE_FAILED, and what `write` throws: an earlier folder is as it was, and the
 *   temporary one is gone.
 */
export async function writeFolder(path: string, write: (temporary: string) => Promise<void>): Promise<void> {
  const target = resolve(path);
  const temporary = temporaryBeside(target);
  try {
    await onDisk(target, 'make a folder beside it', () => mkdir(temporary));
    await write(temporary);
    await syncFolder(temporary);
    await moveInPlace(temporary, target);
  } catch (error) {
    await remove(temporary).catch(() => {}); // what failed first is what counts
    throw error;
  }
  await syncFolder(dirname(target));
}

/** A folder cannot be renamed onto one that has files: the earlier one steps aside, and back where that fails. */
async function moveInPlace(temporary: string, target: string): Promise<void> {
  const move = (from: string, to: string) => onDisk(target, 'rename the new folder to it', () => rename(from, to));
  const there = (await readdir(dirname(target))).includes(basename(target));
  if (!there) return move(temporary, target);
  const aside = temporaryBeside(target);
  await move(target, aside);
  try {
    await move(temporary, target);
  } catch (error) {
    await move(aside, target);
    throw error;
  }
  await onDisk(aside, 'remove it', () => remove(aside));
}

/** Removes a folder so that no part of it is ever seen without the rest. @throws ERR_QLORA_WRITE_FAILED */
export async function removeFolder(path: string): Promise<void> {
  const aside = temporaryBeside(resolve(path));
  await onDisk(path, 'remove it', async () => {
    await rename(path, aside);
    await remove(aside);
  });
}

/** Removes what a killed process left of files and folders that it was writing, or removing. */
export async function removeLeftovers(directory: string): Promise<void> {
  for (const name of await readdir(directory)) {
    if (!temporaryName.test(name) || name.startsWith('.replaced.')) continue;
    await onDisk(join(directory, name), 'remove it', () => remove(join(directory, name)));
  }
}

/**
 * Replaces files of a folder that belong together. `write` fills a temporary folder inside `directory`, so that a full
 * disk is met before anything was replaced; then the files are renamed into place. Where more than weights changes,
 * `marker`, without which no reader takes the folder for whole, is taken away first and comes last: a process killed in
 * between leaves the old files, the new ones, or a folder without marker, never a mixture that can be read.
 *
 * @param optional names that are removed where `write` made no such file
 * @throws ERR_QLORA_DISK_FULL, ERR_QLORA_WRITE_FAILED, and what `write` throws: what was there before is as it was,
 *   unless some files were renamed already; the temporary folder, which then stays, has the rest.
 */
export async function replaceFiles(
  directory: string,
  marker: string,
  optional: readonly string[],
  write: (temporary: string) => Promise<void>,
): Promise<void> {
  const temporary = temporaryBeside(join(resolve(directory), 'saving'));
  const old = temporaryBeside(join(resolve(directory), 'replaced'));
  let replaced = 0;
  let aside = false;
  const move = async (from: string, to: string) => {
    await onDisk(to, `rename ${basename(from)} to it`, () => rename(from, to));
  };
  const place = async (name: string) => {
    await move(join(temporary, name), join(directory, name));
    replaced++;
  };
  try {
    await onDisk(directory, 'make a folder in it', () => mkdir(temporary));
    await write(temporary);
    const names = await readdir(temporary);
    const companions = [...new Set([...names, ...optional])].filter((name) => !name.endsWith('.safetensors'));
    const same = await Promise.all(companions.map((name) => sameBytes(join(directory, name), join(temporary, name))));
    const weightsOnly = same.every(Boolean);
    if (!weightsOnly && (await readdir(directory)).includes(marker)) {
      await move(join(directory, marker), old);
      aside = true;
      await syncFolder(directory);
    }
    for (const name of names) if (name !== marker) await place(name);
    for (const path of optional.filter((name) => !names.includes(name)).map((name) => join(directory, name)))
      await onDisk(path, 'remove it', () => rm(path, { force: true }));
    if (!weightsOnly) await syncFolder(directory);
    await place(marker);
  } catch (error) {
    if (replaced === 0) {
      if (aside) await move(old, join(directory, marker));
      await remove(temporary).catch(() => {}); // what failed first is what counts
    }
    throw error;
  }
  await syncFolder(directory);
  await onDisk(directory, 'remove what was replaced', async () => {
    await remove(temporary);
    await remove(old);
  });
}

/** Whether both have the same bytes, or neither is there; not so where one cannot be read. */
async function sameBytes(a: string, b: string): Promise<boolean> {
  const [x, y] = await Promise.all([a, b].map((path) => readFile(path).catch(({ code }) => code as string)));
  return x instanceof Buffer && y instanceof Buffer ? x.equals(y) : x === 'ENOENT' && y === 'ENOENT';
}
