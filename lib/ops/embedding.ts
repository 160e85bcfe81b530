import type { Tape } from '../autograd.js';
import { type FloatDType, Tensor } from '../tensor.js';

export interface EmbeddingOptions {
  /** Of the result; default: the table's. */
  dtype?: FloatDType;
  /** Multiplies every row; default 1. */
  scale?: number;
}

/**
 * y[i] = table[ids[i]] * scale.
 *
 * @param table [V, C] of any float dtype; a gradient is added to `table.gradient`
 * @param ids i32 of any shape; one outside [0, V) makes the result fail with ERR_QLORA_TOKEN_ID
 * @returns [ids.., C]
 */
export function embedding(
  tape: Tape | undefined,
  table: Tensor,
  ids: Tensor,
  { dtype = table.dtype as FloatDType, scale = 1 }: EmbeddingOptions = {},
): Tensor {
  const y = new Tensor(table.stream, dtype, [...ids.shape, table.dim(-1)]);
  table.stream.run('embeddingForward', table, ids, y, scale);
  tape?.record([table], [y], [ids], ([dy]) => {
    if (table.gradient) table.stream.run('embeddingBackward', dy, ids, table.gradient, scale);
    return [];
  });
  return y;
}
