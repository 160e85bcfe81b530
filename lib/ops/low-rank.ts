/** Matrices of low rank: products that are added to a matrix, and the best approximation of one. */
import { Tensor } from '../tensor.js';
import { zeros } from './elementwise.js';
import { matmul } from './matmul.js';
import { randomUniform } from './random.js';
import { Weight } from './weight.js';

/** More directions than are wanted, and passes over the matrix: as PEFT's pissa_niter_4, the error is that of an exact SVD but for some 1e-3. */
const oversampling = 10;
const passes = 4;

/** W += scale * B A, in fp32. W [N, K], B [N, r], A [r, K]. */
export function addProduct(W: Tensor, B: Tensor, A: Tensor, scale: number): void {
  const r = A.dim(0);
  // scale * B^T, as a product with a scaled unit matrix, which is exact but for the scaling.
  using unit = selection(W, [r, r], 0, scale);
  using transposed = matmul(undefined, unit, Weight.dense(B));
  // Adds (scale * B^T)^T A, as the gradient of a weight is added up.
  W.stream.run('matmulBackwardWeight', transposed, A, W, undefined);
}

/** f32 [rows, columns], `value` where the column is the row plus `offset`, else 0: picks rows or columns in a product. */
export function selection(like: Tensor, [rows, columns]: [number, number], offset: number, value: number): Tensor {
  const values = new Float32Array(rows * columns);
  for (let row = 0; row < rows; row++) {
    const column = row + offset;
    if (column >= 0 && column < columns) values[row * columns + column] = value;
  }
  return Tensor.from(like.stream, values, [rows, columns]);
}

/**
 * Overwrites A [r, K] and B [N, r] so that scale * B A is the best approximation of W of rank r, each with the square
 * roots of the singular values: PiSSA's start. By randomized subspace iteration; the same seed and stream give the same
 * bits.
 *
 * @param W f32 [N, K]
 */
export function principalFactors(
  W: Tensor,
  { A, B }: { A: Tensor; B: Tensor },
  { scale, seed, stream: key }: { scale: number; seed: number; stream: number },
): void {
  const { stream } = W;
  const [N, K] = [W.dim(0), W.dim(1)];
  const r = A.dim(0);
  const L = Math.min(r + oversampling, N, K);
  const orthonormal = (rows: Tensor) => {
    const y = new Tensor(stream, 'f32', rows.shape);
    stream.run('orthonormalizeRows', rows, y);
    return y;
  };
  using start = new Tensor(stream, 'f32', [L, K]);
  randomUniform(start, -1, 1, seed, key);
  let V = orthonormal(start);
  for (let pass = 0; pass < passes; pass++) {
    using Y = matmul(undefined, W, Weight.dense(V));
    using Z = zeros(stream, [L, K], 'f32');
    stream.run('matmulBackwardWeight', Y, W, Z, undefined); // Y^T W
    V.dispose();
    V = orthonormal(Z);
  }
  using Y = matmul(undefined, W, Weight.dense(V));
  using gram = zeros(stream, [L, L], 'f32');
  stream.run('matmulBackwardWeight', Y, Y, gram, undefined);
  using left = new Tensor(stream, 'f32', [r, L]);
  using right = new Tensor(stream, 'f32', [r, L]);
  stream.run('singularFactors', gram, left, right, scale);
  stream.run('matmulForward', Y, ...Weight.dense(left).args, undefined, B);
  stream.run('matmulBackward', right, ...Weight.dense(V).args, A);
  V.dispose();
}
