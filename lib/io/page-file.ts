/** Optimizer state in a file, for more of it than there is memory (csrc/core/page_file.h). */
import { randomBytes } from 'node:crypto';
import { join, resolve } from 'node:path';
import { guard } from '../native.js';
import { type DType, dtypeIndex, type Stream, Tensor } from '../tensor.js';
import { makeFolder } from './folder.js';
import { type NativePageFile, nativeFile } from './native-file.js';

/** How many slots state is streamed through. */
export const pageSlots = 3;
const alignment = 64;

/** What tensors of these sizes take in the file. */
export function pagedBytes(bytes: readonly number[]): number {
  return bytes.reduce((sum, n) => sum + Math.ceil(n / alignment) * alignment, 0);
}

/** A file that no name leads to, and which goes with the last of its tensors. */
export class PageFile implements Disposable {
  readonly #stream: Stream;
  readonly #native: NativePageFile;

  private constructor(stream: Stream, handle: NativePageFile) {
    this.#stream = stream;
    this.#native = handle;
  }

  /**
   * Reserves `bytes` on the disk of `directory`, and three slots of memory.
   *
   * @throws ERR_QLORA_DISK_FULL, ERR_QLORA_WRITE_FAILED, ERR_QLORA_OUT_OF_MEMORY
   */
  static async create(stream: Stream, directory: string, bytes: number, slotBytes: number): Promise<PageFile> {
    await makeFolder(directory);
    const path = join(resolve(directory), `.optimizer.${randomBytes(8).toString('hex')}.qlora-tmp`);
    const handle = guard(() => new nativeFile.PageFile(stream.handle, path, bytes, slotBytes));
    await guard(() => handle.open());
    return new PageFile(stream, handle);
  }

  /** A tensor of zeros in the file, which only optimizers, saving and loading know how to reach. */
  tensor(dtype: DType, shape: readonly number[]): Tensor {
    return new Tensor(
      this.#stream,
      dtype,
      shape,
      'optimizer',
      guard(() => this.#native.tensor(dtypeIndex[dtype], ...shape)),
    );
  }

  [Symbol.dispose](): void {
    this.#native.close();
  }
}
