/** Truncated singular value decomposition, against matrices whose singular values are known. */
import { addProduct, principalFactors } from '../../lib/ops/low-rank.js';
import { Stream, Tensor } from '../../lib/tensor.js';
import { forEachIsa } from '../support/op-harness.js';
import t, { type Test, testDevice } from '../support/testing.js';

/** W [N, K] with these singular values, and random singular vectors. */
function withSingularValues(N: number, K: number, values: readonly number[]): Float32Array {
  let state = 1;
  const random = () => {
    state = (state * 48271) % 2147483647;
    return state / 2147483647 - 0.5;
  };
  const orthonormal = (length: number) => {
    const rows: number[][] = [];
    for (const _ of values) {
      let row = Array.from({ length }, random);
      for (let again = 0; again < 2; again++) {
        for (const other of rows) {
          const common = row.reduce((sum, x, i) => sum + x * (other[i] as number), 0);
          row = row.map((x, i) => x - common * (other[i] as number));
        }
      }
      const norm = Math.hypot(...row);
      rows.push(row.map((x) => x / norm));
    }
    return rows;
  };
  const [U, V] = [orthonormal(N), orthonormal(K)];
  const W = new Float64Array(N * K);
  values.forEach((s, i) => {
    for (let n = 0; n < N; n++) {
      for (let k = 0; k < K; k++) W[n * K + k] = (W[n * K + k] as number) + s * (U[i]?.[n] ?? 0) * (V[i]?.[k] ?? 0);
    }
  });
  return Float32Array.from(W);
}

async function check(t: Test): Promise<void> {
  const stream = new Stream(testDevice);
  const factors = async (W: Float32Array, [N, K]: [number, number], r: number, seed = 1) => {
    using w = Tensor.from(stream, W, [N, K]);
    using A = new Tensor(stream, 'f32', [r, K]);
    using B = new Tensor(stream, 'f32', [N, r]);
    principalFactors(w, { A, B }, { scale: 0.25, seed, stream: 3 });
    addProduct(w, B, A, -0.25);
    const rest = (await w.read()).reduce((sum, x) => sum + x * x, 0);
    return { A: await A.read(), B: await B.read(), rest };
  };
  const values = Array.from({ length: 40 }, (_, i) => 3 * 0.9 ** i);
  for (const [N, K] of [
    [61, 44],
    [44, 61],
    [40, 40],
  ] as [number, number][]) {
    const W = withSingularValues(N, K, values);
    for (const r of [1, 7, 40]) {
      const best = values.slice(r).reduce((sum, s) => sum + s * s, 0);
      const { A, B, rest } = await factors(W, [N, K], r);
      t.ok(rest <= best * 1.001 + 1e-9, `${N} x ${K}, rank ${r}: ${rest}, at best ${best}`);
      // Both carry the square roots of the singular values, over the root of the scale.
      const first = Math.hypot(...A.subarray(0, K)) ** 2;
      t.ok(Math.abs(first - 3 / 0.25) < 1e-3, `the first row of A: ${first}`);
      t.ok(Math.abs(Math.hypot(...B.filter((_, i) => i % r === 0)) ** 2 - 3 / 0.25) < 1e-3);
    }
    t.same(await factors(W, [N, K], 5), await factors(W, [N, K], 5), 'the same seed, the same bits');
    t.notSame((await factors(W, [N, K], 5)).A, (await factors(W, [N, K], 5, 2)).A);
  }
  const thin = await factors(withSingularValues(9, 30, [2, 1]), [9, 30], 6);
  t.ok(thin.rest < 1e-9, 'a rank that the matrix does not have');
  const beyond = await factors(withSingularValues(5, 8, [4, 3, 2, 1, 0.5]), [5, 8], 12);
  t.ok(beyond.rest < 1e-9, 'a rank beyond its size');
  const none = await factors(new Float32Array(40), [5, 8], 3);
  t.ok(
    [...none.A, ...none.B].every((x) => x === 0),
    'nothing of nothing',
  );
  const broken = await factors(new Float32Array(40).fill(Number.NaN), [5, 8], 3);
  t.ok(broken.A.length === 24, 'NaN ends');
  using wide = new Tensor(stream, 'f32', [3, 4]);
  t.throws(() => stream.run('singularFactors', wide, wide, wide, 1), { code: 'ERR_QLORA_SHAPE' });
  using square = new Tensor(stream, 'f32', [3, 3]);
  t.throws(() => stream.run('singularFactors', square, square, square, 0), { code: 'ERR_QLORA_ARGUMENT' });
  t.throws(() => stream.run('orthonormalizeRows', wide, square), { code: 'ERR_QLORA_SHAPE' });
  await stream.close();
}

await forEachIsa(t, import.meta.url, async () => {
  await t.test('the best approximation of a low rank', check);
});
