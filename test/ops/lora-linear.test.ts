// A linear layer with an adapter at sizes where its own products fall into several pieces, which those of matmul.test.ts
// do not: tokens beyond a chunk of K, columns for several tasks, ranks on both sides of a register's lanes.
import { Tape } from '../../lib/autograd.js';
import { loraLinear } from '../../lib/ops/lora-linear.js';
import { dequantizeWeight, quantizeWeight } from '../../lib/ops/quantize.js';
import { type FloatDType, Stream, type Tensor } from '../../lib/tensor.js';
import { forEachIsa, largestError, normalNumbers, roundTo, tensorOf } from '../support/op-harness.js';
import t, { type Test, testDevice } from '../support/testing.js';

const at = (values: ArrayLike<number>, i: number): number => values[i] as number;

/** Element (i, j) of a matrix. */
type Matrix = (i: number, j: number) => number;
const rows =
  (values: ArrayLike<number>, columns: number): Matrix =>
  (i, j) =>
    at(values, i * columns + j);
const transposed =
  (a: Matrix): Matrix =>
  (i, j) =>
    a(j, i);

/** A [M, K] times B [K, N]. */
function product(A: Matrix, B: Matrix, M: number, N: number, K: number): Float64Array {
  const C = new Float64Array(M * N);
  for (let m = 0; m < M; m++) {
    for (let k = 0; k < K; k++) {
      const a = A(m, k);
      for (let n = 0; n < N; n++) C[m * N + n] = at(C, m * N + n) + a * B(k, n);
    }
  }
  return C;
}

async function check(t: Test, dtype: FloatDType, M: number, N: number, K: number, r: number): Promise<void> {
  const stream = new Stream(testDevice);
  const normal = normalNumbers(M + r);
  const scale = 0.5;
  const numbers = (n: number, size: number) => Float64Array.from({ length: n }, () => roundTo(dtype, normal() * size));
  const [x, dy, A, B] = [numbers(M * K, 1), numbers(M * N, 1), numbers(r * K, 0.2), numbers(N * r, 0.2)];
  const weight = await quantizeWeight(tensorOf(stream, dtype, [N, K], numbers(N * K, 1)), {
    type: 'nf4',
    blockSize: 64,
    doubleQuant: true,
  });
  const W = await dequantizeWeight(weight, dtype).read();

  const input = tensorOf(stream, dtype, [M, K], x);
  input.requiresGrad = true;
  const adapter = { A: tensorOf(stream, 'f32', [r, K], A), B: tensorOf(stream, 'f32', [N, r], B), scale };
  for (const parameter of [adapter.A, adapter.B]) {
    parameter.gradient = tensorOf(stream, 'f32', parameter.shape, new Float32Array(parameter.size).fill(1));
  }
  const tape = new Tape();
  const y = loraLinear(tape, input, weight, undefined, adapter);
  const computed: Record<string, ArrayLike<number>> = { y: await y.read() };
  const dx = tape.backward(y, tensorOf(stream, dtype, [M, N], dy), input) as Tensor;
  computed.dx = await dx.read();
  computed.dA = await (adapter.A.gradient as Tensor).read();
  computed.dB = await (adapter.B.gradient as Tensor).read();

  const [X, dY, a, b, w] = [rows(x, K), rows(dy, N), rows(A, K), rows(B, r), rows(W, K)];
  const T = product(X, transposed(a), M, r, K);
  const U = product(dY, b, M, r, N).map((u) => u * scale);
  const sum = (first: Float64Array, second: Float64Array, factor: number) =>
    first.map((value, i) => value + factor * at(second, i));
  const expected: Record<string, Float64Array> = {
    y: sum(product(X, transposed(w), M, N, K), product(rows(T, r), transposed(b), M, N, r), scale),
    dx: sum(product(dY, w, M, K, N), product(rows(U, r), a, M, K, r), 1),
    dA: product(transposed(rows(U, r)), X, r, K, M).map((d) => d + 1),
    dB: product(transposed(dY), rows(T, r), N, r, M).map((d) => 1 + scale * d),
  };
  for (const [name, values] of Object.entries(expected)) {
    const error = largestError(computed[name] as ArrayLike<number>, values, Math.max(...values.map(Math.abs)));
    const limit = dtype === 'f32' ? 4e-6 : 6e-3;
    t.ok(error <= limit, `${dtype} ${M} x ${N} x ${K}, r ${r}: ${name} is off by ${error.toExponential(2)}`);
  }
  weight.dispose();
  await stream.close();
}

await forEachIsa(t, import.meta.url, async () => {
  await t.test('beyond a chunk of tokens', (t) => check(t, 'bf16', 531, 94, 128, 16));
  await t.test('columns of several tasks', (t) => check(t, 'bf16', 45, 591, 576, 9));
  await t.test('a rank of two strips', (t) => check(t, 'bf16', 131, 71, 640, 40));
  await t.test('f32, beyond a chunk of columns', (t) => check(t, 'f32', 45, 71, 576, 9));
});
