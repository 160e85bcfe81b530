import type { Tensor } from '../tensor.js';

/** Fills y (f32) with uniform numbers in [low, high): a function of seed, stream and element alone. */
export function randomUniform(y: Tensor, low: number, high: number, seed: number, stream: number): void {
  y.stream.run('randomUniform', y, low, high, seed, stream);
}
