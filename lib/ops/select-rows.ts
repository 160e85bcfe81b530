import type { Tape } from '../autograd.js';
import { Tensor } from '../tensor.js';

/**
 * y[i] = x[rows[i]].
 *
 * @param x [M, C] of any float dtype
 * @param rows i32 [R], ascending, each in [0, M)
 * @returns [R, C]
 */
export function selectRows(tape: Tape | undefined, x: Tensor, rows: Tensor): Tensor {
  const y = new Tensor(x.stream, x.dtype, [rows.size, x.dim(-1)]);
  x.stream.run('selectRows', x, rows, y);
  const { shape } = x;
  tape?.record([x], [y], [rows], ([dy]) => {
    const dx = new Tensor(x.stream, x.dtype, shape);
    x.stream.run('scatterRows', dy, rows, dx);
    return [dx];
  });
  return y;
}
