/**
 * Parquet files, decoded in a worker thread of limited memory: decoding does not hold up the event loop, and what a
 * hostile file makes it allocate ends the worker, not the process.
 */
import { Worker } from 'node:worker_threads';
import { QLoRAError } from '../errors.js';
import { damaged, unreadable } from './data-errors.js';
import type { ParquetAnswer, ParquetRequest } from './parquet-worker.js';
import type { RawRecord } from './readers.js';

const workerMegabytes = 4096;

/** One worker, one file: asks and waits, so that no more than an answer is in memory. */
async function* ask(path: string, requests: Iterable<ParquetRequest>) {
  const worker = new Worker(new URL('./parquet-worker.js', import.meta.url), {
    workerData: { path },
    execArgv: [],
    resourceLimits: { maxOldGenerationSizeMb: workerMegabytes },
  });
  const dead = new Promise<never>((_, reject) => {
    worker.once('error', (error) => reject(damaged(path, undefined, `it cannot be decoded (${error.message})`, error)));
    worker.once('exit', (code) => reject(damaged(path, undefined, `decoding it ended with code ${code}`)));
  });
  dead.catch(() => {});
  try {
    for (const request of requests) {
      const answered = new Promise<ParquetAnswer>((resolve) => worker.once('message', resolve));
      worker.postMessage(request);
      const answer = await Promise.race([answered, dead]);
      if (answer.kind === 'failed') throw failure(path, answer);
      yield answer;
    }
  } finally {
    await worker.terminate();
  }
}

function failure(path: string, { message, code, group }: ParquetAnswer & { kind: 'failed' }): QLoRAError {
  if (code !== undefined) return unreadable(path, Object.assign(new Error(message), { code }));
  return damaged(
    path,
    undefined,
    `${group === undefined ? '' : `row group ${group}: `}it is no valid parquet: ${message}`,
  );
}

export async function countParquet(path: string): Promise<number> {
  for await (const answer of ask(path, [{ kind: 'open' }])) if (answer.kind === 'opened') return answer.rows;
  throw new QLoRAError('ERR_QLORA_INTERNAL', 'the reader of parquet files gave no answer');
}

export async function* readParquet(path: string): AsyncGenerator<RawRecord> {
  let left = true;
  function* requests(): Generator<ParquetRequest> {
    yield { kind: 'open' };
    while (left) yield { kind: 'next' };
  }
  for await (const answer of ask(path, requests())) {
    if (answer.kind === 'end') left = false;
    if (answer.kind !== 'records') continue;
    for (const record of answer.records) yield { file: path, parse: () => record };
  }
}
