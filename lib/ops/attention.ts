import type { Tape } from '../autograd.js';
import { QLoRAError } from '../errors.js';
import { Tensor } from '../tensor.js';

export interface AttentionOptions {
  /** Scores are scale * dot(q, k). Default: 1 / sqrt(D). */
  scale?: number;
  /** Whether a query sees no key after its own position. */
  causal: boolean;
  /** How many keys a query sees at most, its own position the last; 0, the default, is no limit. */
  window?: number;
  /** Scores s become softCap * tanh(s / softCap); 0, the default, is no cap. */
  softCap?: number;
  /** i32 [B, Tq] and [B, S]: a query sees keys of its own id only; negative ids are padding. Both or neither. */
  querySegments?: Tensor;
  keySegments?: Tensor;
  /** i32 [B], where k and v are a cache with spare room: how many keys there are before those of the queries themselves. */
  pastLength?: Tensor;
}

/**
 * Softmax attention in blocks; csrc/ops/attention.h has the formulas. Query i of Tq stands at key position S - Tq + i, or
 * pastLength[b] + i. A query that sees no key gets zeros.
 *
 * @param q [B, Tq, H, D] of any float dtype
 * @param k [B, S, Hkv, D], H a multiple of Hkv: consecutive query heads share a key head
 * @param v like k
 * @returns [B, Tq, H, D]
 */
export function attention(tape: Tape | undefined, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions): Tensor {
  const { stream } = q;
  const { causal, window = 0, softCap = 0, querySegments, keySegments } = options;
  const { scale = 1 / Math.sqrt(q.dim(-1)), pastLength } = options;
  const needsGradient = q.requiresGrad || k.requiresGrad || v.requiresGrad;
  if (tape && needsGradient && pastLength) {
    throw new QLoRAError('ERR_QLORA_ARGUMENT', 'attention has no gradients where pastLength is given', {
      hint: 'A cache with spare room is for generation, without a tape.',
    });
  }
  const out = new Tensor(stream, q.dtype, q.shape);
  using logSumExp = new Tensor(stream, 'f32', [q.dim(0), q.dim(2), q.dim(1)]);
  const segments = [querySegments, keySegments];
  const rules = [scale, causal ? 1 : 0, window, softCap];
  stream.run('attentionForward', q, k, v, ...segments, pastLength, out, logSumExp, ...rules);
  const saved = [q, k, v, out, logSumExp, ...segments.filter((s) => s !== undefined)];
  tape?.record([q, k, v], [out], saved, ([dout]) => {
    const gradients = [q, k, v].map((x) => new Tensor(stream, x.dtype, x.shape));
    stream.run('attentionBackward', dout, q, k, v, out, logSumExp, ...segments, ...gradients, ...rules);
    return gradients;
  });
  return out;
}
