import type { Tape } from '../autograd.js';
import { type FloatDType, Tensor } from '../tensor.js';
import type { Weight } from './weight.js';

/**
 * y = x W^T + bias, computed in x's dtype with sums in fp32.
 *
 * @param x [.., K] of any float dtype
 * @param weight [N, K] of any kind; a dense f32 one may be trained
 * @param bias [N]
 * @param dtype of y: x's, or 'f32'
 */
export function matmul(
  tape: Tape | undefined,
  x: Tensor,
  weight: Weight,
  bias?: Tensor,
  dtype: FloatDType = x.dtype as FloatDType,
): Tensor {
  const y = new Tensor(x.stream, dtype, [...x.shape.slice(0, -1), weight.N]);
  x.stream.run('matmulForward', x, ...weight.args, bias, y);
  const parameters = bias ? [weight.tensors.data, bias] : [weight.tensors.data];
  const trained = parameters.some((p) => p.requiresGrad);
  tape?.record([x, ...parameters], [y], trained ? [x, ...weight.held] : weight.held, ([dy]) => {
    if (trained) {
      x.stream.run('matmulBackwardWeight', dy, x, weight.tensors.data.gradient, bias?.gradient);
    }
    if (!x.requiresGrad) return [];
    const dx = new Tensor(x.stream, x.dtype, x.shape);
    x.stream.run('matmulBackward', dy, ...weight.args, dx);
    return [dx];
  });
  return y;
}
