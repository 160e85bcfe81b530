import type { Tape } from '../autograd.js';
import { Tensor } from '../tensor.js';

export interface NeftuneKey {
  seed: number;
  /** A number that nothing else random of the step has. */
  stream: number;
}

/**
 * x + magnitude * (noise uniform in [-1, 1)): a function of the key, the row and the place in the row alone. Its gradient
 * passes through.
 *
 * @param x [B, T, C] of any float dtype
 * @param magnitude f32 [B, T], 0 where there is to be no noise
 */
export function neftune(tape: Tape | undefined, x: Tensor, magnitude: Tensor, { seed, stream }: NeftuneKey): Tensor {
  const y = new Tensor(x.stream, x.dtype, x.shape);
  x.stream.run('neftune', x, magnitude, y, seed, stream);
  tape?.record([x], [y], [], ([dy]) => [dy]);
  return y;
}
