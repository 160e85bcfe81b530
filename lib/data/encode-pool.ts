/** Workers that encode rows beside the event loop. Chunks come back in the order in which they were given. */
import { availableParallelism } from 'node:os';
import { Worker } from 'node:worker_threads';
import { QLoRAError } from '../errors.js';
import type { EncodeAnswer, EncodeTask } from './encode-worker.js';
import type { EncodedChunk } from './encoded-chunk.js';
import type { LocatedRow } from './rows.js';

const mostWorkers = 8;

class EncodeWorker {
  readonly #worker: Worker;
  /** Why it ended. */
  #failure: QLoRAError | undefined;
  readonly #waiting: { resolve(chunk: EncodedChunk): void; reject(error: unknown): void }[] = [];

  constructor(task: EncodeTask) {
    this.#worker = new Worker(new URL('./encode-worker.js', import.meta.url), { workerData: task, execArgv: [] });
    this.#worker.on('message', (answer: EncodeAnswer) => {
      const waiting = this.#waiting.shift();
      if ('chunk' in answer) waiting?.resolve(answer.chunk);
      else waiting?.reject(revived(answer.error));
    });
    const failed = (what: string) => {
      const error = new QLoRAError('ERR_QLORA_INTERNAL', `a thread that encodes rows ended: ${what}`);
      this.#failure ??= error;
      for (const { reject } of this.#waiting.splice(0)) reject(error);
    };
    this.#worker.once('error', ({ message }) => failed(message));
    this.#worker.once('exit', (code) => failed(`code ${code}`));
  }

  encode(rows: readonly LocatedRow[]): Promise<EncodedChunk> {
    if (this.#failure) return Promise.reject(this.#failure);
    return new Promise((resolve, reject) => {
      this.#waiting.push({ resolve, reject });
      this.#worker.postMessage(rows);
    });
  }

  async close(): Promise<void> {
    await this.#worker.terminate();
  }
}

function revived({
  code,
  message,
  hint,
  detail,
}: {
  code?: `ERR_QLORA_${string}`;
  message: string;
  hint?: string;
  detail?: Readonly<Record<string, unknown>>;
}): Error {
  return new QLoRAError(code ?? 'ERR_QLORA_INTERNAL', message, { hint, detail });
}

export class EncodePool {
  readonly #workers: readonly EncodeWorker[];
  #next = 0;

  constructor(task: EncodeTask) {
    const count = Math.min(availableParallelism(), mostWorkers);
    this.#workers = Array.from({ length: count }, () => new EncodeWorker(task));
  }

  /** So many chunks keep every worker busy; who gives more lets them pile up. */
  get depth(): number {
    return 2 * this.#workers.length;
  }

  /** In turns: chunks are of like size. */
  encode(rows: readonly LocatedRow[]): Promise<EncodedChunk> {
    const worker = this.#workers[this.#next++ % this.#workers.length] as EncodeWorker;
    return worker.encode(rows);
  }

  async close(): Promise<void> {
    await Promise.all(this.#workers.map((worker) => worker.close()));
  }
}
