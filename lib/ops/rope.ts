import type { Tape } from '../autograd.js';
import { Tensor } from '../tensor.js';

/** Cosine and sine of every token's angles, f32 [M, R / 2] each. */
export interface RopeTable {
  cos: Tensor;
  sin: Tensor;
}

/**
 * The table for `rope`: cos and sin of fp32(position * inverse frequency), times factor.
 *
 * @param positions i32 [M]
 * @param inverseFrequencies R / 2 of them, radians a position
 * @param factor scales both; 1 but for some long-context variants
 */
export function ropeTable(positions: Tensor, inverseFrequencies: Float32Array, factor = 1): RopeTable {
  const { stream } = positions;
  using frequencies = Tensor.from(stream, inverseFrequencies, [inverseFrequencies.length]);
  const shape = [positions.size, inverseFrequencies.length];
  const table = { cos: new Tensor(stream, 'f32', shape), sin: new Tensor(stream, 'f32', shape) };
  stream.run('ropeTable', positions, frequencies, table.cos, table.sin, factor);
  return table;
}

/**
 * Turns the first R dimensions of every head by its token's angles: pairs are (r, r + R / 2), as in GPT-NeoX. The rest
 * passes through.
 *
 * @param x [.., H, D] of any float dtype, whose leading dimensions multiply to the M of the table; y has the same
 */
export function rope(tape: Tape | undefined, x: Tensor, { cos, sin }: RopeTable): Tensor {
  const y = new Tensor(x.stream, x.dtype, x.shape);
  x.stream.run('rope', x, cos, sin, y, 1);
  tape?.record([x], [y], [cos, sin], ([dy]) => {
    const dx = new Tensor(x.stream, x.dtype, x.shape);
    x.stream.run('rope', dy, cos, sin, dx, -1);
    return [dx];
  });
  return y;
}
