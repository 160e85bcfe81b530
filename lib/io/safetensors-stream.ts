/** safetensors files whose tensors are made one after the other, so that no two need to be in memory at once. */
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import { bytesPerElement, type FloatDType, type Tensor } from '../tensor.js';
import { writeFileAtomic } from './atomic-file.js';
import { onDisk } from './folder.js';
import { fileDTypes, safetensorsHeader } from './safetensors.js';

/** A tensor that is yet to be made. */
export interface LazyTensor {
  readonly name: string;
  readonly dtype: FloatDType;
  readonly shape: readonly number[];
  /** Of that dtype and size; disposed of once it is written. */
  readonly make: () => Promise<Tensor>;
}

const chunkBytes = 16 * 2 ** 20;

const bytesOf = ({ dtype, shape }: LazyTensor) => shape.reduce((n, d) => n * d, 1) * bytesPerElement[dtype];

/** Writes and syncs a file that was not there. It is not atomic: its folder is to be. */
async function writeShard(path: string, items: readonly LazyTensor[], signal: AbortSignal | undefined): Promise<void> {
  const rows = items.map((item) => ({ ...item, dtype: fileDTypes[item.dtype], bytes: bytesOf(item) }));
  await using file = await onDisk(path, 'create it', () => open(path, 'wx'));
  const writeAll = async (bytes: Uint8Array) => {
    for (let at = 0; at < bytes.length; ) {
      signal?.throwIfAborted();
      const length = Math.min(chunkBytes, bytes.length - at);
      at += (await onDisk(path, 'write it', () => file.write(bytes, at, length))).bytesWritten;
    }
  };
  await writeAll(safetensorsHeader(rows, { format: 'pt' }));
  for (const item of items) {
    signal?.throwIfAborted();
    using tensor = await item.make();
    const { buffer, byteOffset, byteLength } = await tensor.readBits();
    await writeAll(new Uint8Array(buffer, byteOffset, byteLength));
  }
  await onDisk(path, 'sync it', () => file.sync());
}

/**
 * Writes model.safetensors into a folder, or where the tensors take more than `shardBytes`, shards of at most so many
 * (a tensor that is larger has one of its own) with model.safetensors.index.json.
 *
 * @throws ERR_QLORA_DISK_FULL, ERR_QLORA_WRITE_FAILED, the signal's reason
 */
export async function writeModelTensors(
  directory: string,
  items: readonly LazyTensor[],
  { shardBytes, signal }: { shardBytes: number; signal?: AbortSignal },
): Promise<void> {
  const shards: LazyTensor[][] = [];
  let room = 0;
  for (const item of items) {
    const bytes = bytesOf(item);
    if (shards.length === 0 || bytes > room) {
      shards.push([]);
      room = shardBytes;
    }
    shards.at(-1)?.push(item);
    room -= bytes;
  }
  if (shards.length === 1) return writeShard(join(directory, 'model.safetensors'), items, signal);
  const number = (n: number) => String(n).padStart(5, '0');
  const map: Record<string, string> = {};
  for (const [i, shard] of shards.entries()) {
    const name = `model-${number(i + 1)}-of-${number(shards.length)}.safetensors`;
    for (const item of shard) map[item.name] = name;
    await writeShard(join(directory, name), shard, signal);
  }
  const index = { metadata: { total_size: items.reduce((sum, item) => sum + bytesOf(item), 0) }, weight_map: map };
  await writeFileAtomic(join(directory, 'model.safetensors.index.json'), `${JSON.stringify(index, undefined, 2)}\n`);
}
