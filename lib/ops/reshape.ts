import type { Tape } from '../autograd.js';
import type { Tensor } from '../tensor.js';

/** The same values in another shape of the same size; no copy. */
export function reshape(tape: Tape | undefined, x: Tensor, shape: readonly number[]): Tensor {
  const y = x.view(shape);
  y.requiresGrad = false;
  tape?.record([x], [y], [], ([dy]) => [dy?.view(x.shape)]);
  return y;
}
