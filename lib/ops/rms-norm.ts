import type { Tape } from '../autograd.js';
import { Tensor } from '../tensor.js';

/**
 * y = x / sqrt(mean(x^2) + eps) * (weight + offset), over the last dimension.
 *
 * @param x [.., D] of any float dtype; y has the same
 * @param weight [D]
 */
export function rmsNorm(tape: Tape | undefined, x: Tensor, weight: Tensor, eps: number, offset = 0): Tensor {
  const y = new Tensor(x.stream, x.dtype, x.shape);
  using rstd = new Tensor(x.stream, 'f32', [x.rows]);
  x.stream.run('rmsNormForward', x, weight, y, rstd, eps, offset);
  tape?.record([x, weight], [y], [x, weight, rstd], ([dy]) => {
    const dx = x.requiresGrad ? new Tensor(x.stream, x.dtype, x.shape) : undefined;
    x.stream.run('rmsNormBackward', dy, x, weight, rstd, dx, weight.gradient, offset);
    return [dx];
  });
  return y;
}
