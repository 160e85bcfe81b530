import type { Tape } from '../autograd.js';
import { type DType, type FloatDType, type MemoryClass, type Stream, Tensor } from '../tensor.js';

/** Overwrites every element of x, of any dtype, with `value`. */
export function fill(x: Tensor, value: number): void {
  x.stream.run('fill', x, value);
}

/** A new tensor of zeros. */
export function zeros(stream: Stream, shape: readonly number[], dtype: DType, memoryClass?: MemoryClass): Tensor {
  const x = new Tensor(stream, dtype, shape, memoryClass);
  fill(x, 0);
  return x;
}

/** y = a + b: one shape, one float dtype. */
export function add(tape: Tape | undefined, a: Tensor, b: Tensor): Tensor {
  const y = new Tensor(a.stream, a.dtype, a.shape);
  a.stream.run('add', a, b, y);
  tape?.record([a, b], [y], [], ([dy]) => [a.requiresGrad ? dy : undefined, b.requiresGrad ? dy : undefined]);
  return y;
}

/** y = x * factor, of x's float dtype. */
export function scale(tape: Tape | undefined, x: Tensor, factor: number): Tensor {
  const y = new Tensor(x.stream, x.dtype, x.shape);
  x.stream.run('scale', x, y, factor);
  tape?.record([x], [y], [], ([dy]) => [scale(undefined, dy as Tensor, factor)]);
  return y;
}

/** y = x * factor[0], with a factor (f32 [1]) that gets no gradient. */
export function scaleByTensor(tape: Tape | undefined, x: Tensor, factor: Tensor): Tensor {
  const y = new Tensor(x.stream, x.dtype, x.shape);
  x.stream.run('scaleByTensor', x, factor, y);
  tape?.record([x], [y], [factor], ([dy]) => [scaleByTensor(undefined, dy as Tensor, factor)]);
  return y;
}

/** x rounded to another float dtype, to nearest, ties to even. Its gradient is rounded back to x's. */
export function cast(tape: Tape | undefined, x: Tensor, dtype: FloatDType, memoryClass?: MemoryClass): Tensor {
  const y = new Tensor(x.stream, dtype, x.shape, memoryClass);
  x.stream.run('cast', x, y);
  tape?.record([x], [y], [], ([dy]) => [cast(undefined, dy as Tensor, x.dtype as FloatDType)]);
  return y;
}

/** What a dropout mask depends on, besides the place of the element. */
export interface DropoutKey {
  /** Probability of 0, in [0, 1). */
  p: number;
  seed: number;
  /** A number that no other dropout of the step has. */
  stream: number;
}

/** Sets elements of x to 0 with probability p and scales the rest by 1 / (1 - p): a function of the key alone. */
export function dropout(tape: Tape | undefined, x: Tensor, key: DropoutKey): Tensor {
  const y = new Tensor(x.stream, x.dtype, x.shape);
  x.stream.run('dropout', x, y, key.p, key.seed, key.stream);
  tape?.record([x], [y], [], ([dy]) => [dropout(undefined, dy as Tensor, key)]);
  return y;
}
