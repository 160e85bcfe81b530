import type { Tape } from '../autograd.js';
import { Tensor } from '../tensor.js';
import type { Weight } from './weight.js';

export interface LoraArguments {
  /** f32 [r, K]; without a tape also of x's dtype, as it would be rounded */
  A: Tensor;
  /** f32 [N, r]; likewise */
  B: Tensor;
  scale: number;
  /** Share of x that the adapter does not see; default 0. */
  dropout?: number;
  /** Of the mask. */
  seed?: number;
  stream?: number;
}

/**
 * y = x W^T + bias + scale * (dropout(x) A^T) B^T, computed in x's dtype. The mask is made again in the backward pass,
 * never kept.
 *
 * @param x [.., K] of any float dtype
 * @param weight [N, K] of any kind, frozen
 * @param bias [N], frozen
 */
export function loraLinear(
  tape: Tape | undefined,
  x: Tensor,
  weight: Weight,
  bias: Tensor | undefined,
  { A, B, scale, dropout = 0, seed = 0, stream = 0 }: LoraArguments,
): Tensor {
  const rows = x.shape.slice(0, -1);
  const y = new Tensor(x.stream, x.dtype, [...rows, weight.N]);
  using t = new Tensor(x.stream, x.dtype, [...rows, A.dim(0)]);
  x.stream.run('loraLinearForward', x, ...weight.args, bias, A, B, y, t, scale, dropout, seed, stream);
  tape?.record([x, A, B], [y], [x, A, B, t, ...weight.held], ([dy]) => {
    const dx = x.requiresGrad ? new Tensor(x.stream, x.dtype, x.shape) : undefined;
    // Where the adapter itself is frozen its gradients still need a place.
    using dA = A.gradient ? undefined : new Tensor(x.stream, 'f32', A.shape, 'scratch');
    using dB = B.gradient ? undefined : new Tensor(x.stream, 'f32', B.shape, 'scratch');
    for (const unwanted of [dA, dB]) if (unwanted) x.stream.run('fill', unwanted, 0);
    x.stream.run(
      'loraLinearBackward',
      dy,
      x,
      ...weight.args,
      A,
      B,
      t,
      dx,
      A.gradient ?? dA,
      B.gradient ?? dB,
      scale,
      dropout,
      seed,
      stream,
    );
    return [dx];
  });
  return y;
}
