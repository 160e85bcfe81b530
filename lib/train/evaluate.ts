import type { RowStore } from '../data/row-store.js';
import type { ModelCore } from '../models/core.js';
import { enqueueLoss, evalBatches, readScalar } from './micro-step.js';

export interface Evaluation {
  loss: number;
  perplexity: number;
}

/** Mean loss over all target tokens of these rows, without dropout. */
export async function evaluateRows(
  core: ModelCore,
  adapter: string | undefined,
  rows: RowStore,
  batchSize: number,
  signal?: AbortSignal,
): Promise<Evaluation> {
  const batches = evalBatches(rows, batchSize);
  const targets = batches.flat().reduce((n, i) => n + rows.targets(i), 0);
  const pass = { adapter, checkpointing: 'none' as const };
  let loss = 0;
  for (const batch of batches) {
    signal?.throwIfAborted();
    const part = (await rows.rows(batch)).map((row) => [row]);
    loss += await readScalar(enqueueLoss(core, undefined, part, 1 / targets, pass));
  }
  return { loss, perplexity: Math.exp(loss) };
}
