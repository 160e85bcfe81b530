import { type Stream, Tensor } from '../tensor.js';

/**
 * [norm, finite], f32: the Euclidean norm of all gradients together, and 1 where it is a finite number, else 0. The
 * optimizers read it on the stream, so that no step waits for it.
 *
 * @param gradients f32 of any shapes
 */
export function gradNorm(stream: Stream, gradients: readonly Tensor[]): Tensor {
  const out = new Tensor(stream, 'f32', [2]);
  stream.run('gradNorm', gradients, out);
  return out;
}
