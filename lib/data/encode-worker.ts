/** A worker that encodes rows: see encode-pool.ts. */
import { parentPort, workerData } from 'node:worker_threads';
import { QLoRAError } from '../errors.js';
import { Tokenizer } from '../tokenizer/tokenizer.js';
import type { EncodeOptions } from './encode.js';
import { ChunkBuilder, type EncodedChunk } from './encoded-chunk.js';
import type { LocatedRow } from './rows.js';

export interface EncodeTask {
  directory: string;
  options: EncodeOptions;
}
/** An error loses its class and fields on its way between threads. */
export interface PlainError {
  code?: `ERR_QLORA_${string}`;
  message: string;
  hint?: string;
  detail?: Readonly<Record<string, unknown>>;
}
export type EncodeAnswer = { chunk: EncodedChunk } | { error: PlainError };

const { directory, options } = workerData as EncodeTask;
const loading = Tokenizer.load(directory);

async function encode(rows: readonly LocatedRow[]): Promise<EncodeAnswer> {
  try {
    const tokenizer = await loading;
    const builder = new ChunkBuilder();
    for (const row of rows) builder.add(row, tokenizer, options);
    return { chunk: builder.take() };
  } catch (error) {
    const { message } = error as Error;
    if (!(error instanceof QLoRAError)) return { error: { message } };
    return { error: { code: error.code, message, hint: error.hint, detail: error.detail } };
  }
}

parentPort?.on('message', async (rows: LocatedRow[]) => {
  const answer = await encode(rows);
  const moved = 'chunk' in answer ? [answer.chunk.words.buffer, answer.chunk.index.buffer] : [];
  parentPort?.postMessage(answer, moved as ArrayBuffer[]);
});
