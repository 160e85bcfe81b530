import type { RowStore } from '../data/row-store.js';
import type { ModelCore } from '../models/core.js';
import { enqueueLoss, readScalar } from './micro-step.js';

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
  const indices = Array.from({ length: rows.count }, (_, i) => i);
  const targets = indices.reduce((n, i) => n + rows.targets(i), 0);
  const pass = { adapter, checkpointing: 'none' as const };
  let loss = 0;
  for (let i = 0; i < rows.count; i += batchSize) {
    signal?.throwIfAborted();
    const part = await rows.rows(indices.slice(i, i + batchSize));
    loss += await readScalar(enqueueLoss(core, undefined, part, 1 / targets, pass));
  }
  return { loss, perplexity: Math.exp(loss) };
}
