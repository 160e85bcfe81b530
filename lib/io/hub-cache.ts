/**
 * Hugging Face's cache of a repository: blobs/<etag> hold contents, snapshots/<commit>/<path> are links to them,
 * refs/<revision> hold commits. A blob on its way is blobs/<etag>.incomplete.
 */
import { createHash } from 'node:crypto';
import { constants, createReadStream } from 'node:fs';
import { type FileHandle, open, rename, rm, stat, symlink } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { QLoRAError } from '../errors.js';
import { writeFileAtomic } from './atomic-file.js';
import { makeFolder, onDisk } from './folder.js';

export interface Blob {
  readonly repository: string;
  readonly etag: string;
  readonly size: number;
  readonly signal: AbortSignal | undefined;
}

/** Attempts in a row that bring no byte. */
const mostAttempts = 4;
/** Milliseconds before the second of them; doubled for each that follows. */
const firstPause = 100;

/**
 * Brings a blob into the cache. What an earlier attempt left is gone on from; a connection that breaks is opened again.
 *
 * @param read opens the content from that byte on
 * @throws ERR_QLORA_DOWNLOAD_FAILED (it is not what its name says: removed), ERR_QLORA_DISK_FULL,
 *   ERR_QLORA_WRITE_FAILED, and what `read` throws
 */
export async function downloadBlob(
  blob: Blob,
  onProgress: (bytes: number) => void,
  read: (from: number) => Promise<ReadableStream<Uint8Array>>,
): Promise<void> {
  const path = join(blob.repository, 'blobs', blob.etag);
  if (await stat(path).catch(() => undefined)) return onProgress(blob.size);
  await makeFolder(dirname(path));
  const incomplete = `${path}.incomplete`;
  {
    // Written by position, so that two processes that fetch the same blob write the same.
    const flags = constants.O_RDWR | constants.O_CREAT;
    await using file = await onDisk(incomplete, 'create it', () => open(incomplete, flags));
    await fill(file, blob, onProgress, read);
    await onDisk(incomplete, 'sync it', () => file.sync());
  }
  await verify(incomplete, blob);
  await onDisk(path, 'rename the download to it', () =>
    rename(incomplete, path).catch(async (error) => {
      if (!(await stat(path).catch(() => undefined))) throw error; // another process was as quick
    }),
  );
}

async function fill(
  file: FileHandle,
  { size, signal }: Blob,
  onProgress: (bytes: number) => void,
  read: (from: number) => Promise<ReadableStream<Uint8Array>>,
): Promise<void> {
  let { size: at } = await file.stat();
  if (at > size) {
    await file.truncate(0);
    at = 0;
  }
  onProgress(at);
  for (let attempt = 0; at < size; attempt++) {
    signal?.throwIfAborted();
    try {
      for await (const chunk of await read(at)) {
        signal?.throwIfAborted();
        await writeAt(file, chunk, at);
        at += chunk.length;
        attempt = 0;
        onProgress(at);
      }
      if (at < size) throw new Error(`the connection ended after ${at} of ${size} bytes`);
    } catch (error) {
      if (signal?.aborted || isFinal(error) || attempt >= mostAttempts) throw error;
      await setTimeout(firstPause * 2 ** attempt, undefined, { signal });
    }
  }
}

async function writeAt(file: FileHandle, chunk: Uint8Array, at: number): Promise<void> {
  for (let done = 0; done < chunk.length; ) {
    const write = () => file.write(chunk, done, chunk.length - done, at + done);
    done += (await onDisk('the cache of the hub', 'write a download', write)).bytesWritten;
  }
}

/** Whether trying again would end alike: the disk failed, or the server refuses. */
function isFinal(error: unknown): boolean {
  if (error instanceof QLoRAError) return true;
  const { statusCode } = error as { statusCode?: number };
  return statusCode !== undefined && statusCode >= 400 && statusCode < 500 && statusCode !== 408 && statusCode !== 429;
}

/** A name of 64 digits is the SHA-256 of the content, one of 40 what git calls it. */
async function verify(path: string, { etag, size }: Blob): Promise<void> {
  const hash = etag.length === 64 ? createHash('sha256') : createHash('sha1').update(`blob ${size}\0`);
  for await (const chunk of createReadStream(path, { highWaterMark: 2 ** 20 })) hash.update(chunk as Buffer);
  const got = hash.digest('hex');
  if (got === etag) return;
  await rm(path, { force: true });
  throw new QLoRAError(
    'ERR_QLORA_DOWNLOAD_FAILED',
    `${path}: the content has the hash ${got}, which was to be ${etag}`,
    {
      hint: 'It was damaged on its way, and removed: try again.',
    },
  );
}

/** The place of a blob in a commit's folder. */
export async function linkSnapshot(repository: string, commit: string, name: string, etag: string): Promise<void> {
  const path = join(repository, 'snapshots', commit, name);
  await makeFolder(dirname(path));
  await onDisk(path, 'make this link', () =>
    symlink(join('..', '..', 'blobs', etag), path).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== 'EEXIST') throw error;
    }),
  );
}

/** Remembers which commit a revision is, now that its snapshot is complete. Returns the snapshot's folder. */
export async function storeRef(repository: string, revision: string, commit: string): Promise<string> {
  if (revision !== commit) {
    const path = join(repository, 'refs', revision);
    await makeFolder(dirname(path));
    await writeFileAtomic(path, commit);
  }
  return join(repository, 'snapshots', commit);
}
