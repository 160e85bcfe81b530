/** manifest.json: length and SHA-256 of every other file of a folder, written last. What it lists is whole. */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { lstat, readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { QLoRAError } from '../errors.js';
import { writeFileAtomic } from './atomic-file.js';
import { isObject, readJsonObject, show } from './json.js';

const manifestName = 'manifest.json';
/** Bytes hashed between two turns of the event loop: well under a millisecond's work. */
const slice = 256 * 1024;

async function sha256(path: string): Promise<string> {
  const hash = createHash('sha256');
  for await (const part of createReadStream(path, { highWaterMark: slice })) hash.update(part as Buffer);
  return hash.digest('hex');
}

/** Reads every file of the folder back, and writes the manifest. */
export async function writeManifest(directory: string): Promise<void> {
  const files: Record<string, { bytes: number; sha256: string }> = {};
  for (const name of (await readdir(directory)).sort()) {
    const path = join(directory, name);
    try {
      files[name] = { bytes: (await lstat(path)).size, sha256: await sha256(path) };
    } catch (cause) {
      throw new QLoRAError('ERR_QLORA_READ_FAILED', `${path}: cannot read it back: ${(cause as Error).message}`, {
        hint: 'Check the disk.',
        cause,
      });
    }
  }
  await writeFileAtomic(join(directory, manifestName), `${JSON.stringify({ version: 1, files }, undefined, 2)}\n`);
}

/** What is wrong with a folder that should have a manifest and agree with it; undefined where nothing is. */
export async function faultOf(directory: string): Promise<string | undefined> {
  try {
    const { version, files } = await readJsonObject(join(directory, manifestName));
    if (version !== 1 || !isObject(files)) return `${manifestName} is of a version that this library does not read`;
    for (const [name, entry] of Object.entries(files)) {
      // Names from a file: none may lead out of the folder.
      if (/[/\\\0]/.test(name) || name.startsWith('.'))
        return `${manifestName} lists ${show(name)}, which is no plain name`;
      if (!isObject(entry)) return `${manifestName} says nothing of ${name}`;
      const path = join(directory, name);
      const status = await lstat(path);
      if (!status.isFile()) return `${name} is no regular file`;
      if (status.size !== entry.bytes) return `${name} has ${status.size} bytes, written were ${show(entry.bytes)}`;
      if ((await sha256(path)) !== entry.sha256) return `${name} is not what was written: its SHA-256 differs`;
    }
    return undefined;
  } catch (error) {
    return (error as Error).message;
  }
}
