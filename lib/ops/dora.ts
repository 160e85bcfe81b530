import type { Tape } from '../autograd.js';
import { dtypeIndex, type FloatDType, Tensor } from '../tensor.js';
import type { Weight } from './weight.js';

/**
 * Lengths of the rows of W + scale * B A, f32 [N]; W dequantized to `dtype`.
 *
 * @param norm where they are written; default: a new tensor
 */
export function loraRowNorm(
  weight: Weight,
  A: Tensor,
  B: Tensor,
  scale: number,
  dtype: FloatDType,
  norm = new Tensor(A.stream, 'f32', [weight.N]),
): Tensor {
  A.stream.run('loraRowNorm', ...weight.args, A, B, norm, scale, dtypeIndex[dtype]);
  return norm;
}

/**
 * y = z * magnitude / norm + bias, by output feature. The gradient takes norm for a constant, as DoRA's paper does.
 *
 * @param z [.., N]
 * @param magnitude f32 [N], trained
 * @param norm f32 [N]
 * @param bias [N], frozen
 */
export function doraScale(tape: Tape | undefined, z: Tensor, magnitude: Tensor, norm: Tensor, bias?: Tensor): Tensor {
  const y = new Tensor(z.stream, z.dtype, z.shape);
  z.stream.run('doraScaleForward', z, magnitude, norm, bias, y);
  tape?.record([z, magnitude], [y], [z, magnitude, norm], ([dy]) => {
    const dz = z.requiresGrad ? new Tensor(z.stream, z.dtype, z.shape) : undefined;
    z.stream.run('doraScaleBackward', dy, z, magnitude, norm, dz, magnitude.gradient);
    return [dz];
  });
  return y;
}
