/** A file that is added to in the order of the calls, without anybody waiting. */
import { type FileHandle, open } from 'node:fs/promises';

export class AppendFile {
  readonly #path: string;
  #file: FileHandle | undefined;
  /** Bytes that were written whole; behind them a failed write may have left a part. */
  #size: number;
  #pending: (string | Uint8Array)[] = [];
  #writing: Promise<void> = Promise.resolve();

  /** @param size of the file as it is, to write behind; 0 begins it anew */
  constructor(path: string, size = 0) {
    this.#path = path;
    this.#size = size;
  }

  add(data: string | Uint8Array): void {
    this.#pending.push(data);
  }

  /**
   * Writes what was added. Where that fails, it is kept for the next time.
   *
   * @throws what the file system said
   */
  flush(): Promise<void> {
    this.#writing = this.#writing.catch(() => {}).then(() => this.#write());
    return this.#writing;
  }

  async close(): Promise<void> {
    await this.#file?.close();
    this.#file = undefined;
  }

  async #write(): Promise<void> {
    const parts = this.#pending;
    if (parts.length === 0) return;
    this.#pending = [];
    try {
      this.#file ??= await open(this.#path, this.#size > 0 ? 'r+' : 'w');
      const bytes = Buffer.concat(parts.map((part) => Buffer.from(part as string)));
      let done = 0;
      while (done < bytes.length) {
        done += (await this.#file.write(bytes, done, bytes.length - done, this.#size + done)).bytesWritten;
      }
      this.#size += bytes.length;
    } catch (error) {
      this.#pending = [...parts, ...this.#pending];
      throw error;
    }
  }
}
