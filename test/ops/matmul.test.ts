// Products with a weight of every kind, with and without adapters: against fp64, against the stored references of
// bitsandbytes' arithmetic, on every instruction set.
import { join } from 'node:path';
import { Tape } from '../../lib/autograd.js';
import { doraScale, loraRowNorm } from '../../lib/ops/dora.js';
import { loraLinear } from '../../lib/ops/lora-linear.js';
import { matmul } from '../../lib/ops/matmul.js';
import { dynamicMap, fourBitCode } from '../../lib/ops/quantize.js';
import { Weight } from '../../lib/ops/weight.js';
import { type FloatDType, Stream, Tensor } from '../../lib/tensor.js';
import {
  checkMisuse,
  checkOps,
  forEachIsa,
  largestError,
  normalNumbers,
  type OpCase,
  type OpInput,
  roundTo,
  tensorOf,
  type Values,
} from '../support/op-harness.js';
import { dropoutFactors } from '../support/philox.js';
import { readJson, referencesDir } from '../support/references.js';
import { readSafetensors, valuesOf } from '../support/safetensors.js';
import t, { type Test, testDevice } from '../support/testing.js';

const f = Math.fround;
const at = (values: ArrayLike<number>, i: number): number => values[i] as number;

/** How a weight [N, K] is made from inputs of the harness, and what its values are before they are rounded. */
interface Kind {
  name: string;
  inputs(N: number, K: number): Record<string, OpInput>;
  weight(tensors: Record<string, Tensor>, N: number, K: number): Weight;
  values(values: Values, N: number, K: number): Float64Array;
}

function fourBit(blockSize: number, isNested: boolean): Kind {
  const blocks = (N: number, K: number) => Math.ceil((N * K) / blockSize);
  const byte = (i: number) => (Math.imul(i + 7, 2654435761) >>> 13) & 255;
  const scales = (v: Values, block: number) => {
    if (!isNested) return at(v.absmax as Float64Array, block);
    const scaled = f(
      at(v.nestedCode as Float64Array, at(v.absmax as Float64Array, block)) *
        at(v.nestedAbsmax as Float64Array, block >> 8),
    );
    return f(scaled + 0.25);
  };
  return {
    name: `4-bit, blocks of ${blockSize}${isNested ? ', double' : ''}`,
    inputs: (N, K) => ({
      data: { shape: [Math.ceil((N * K) / 2)], dtype: 'u8', value: byte },
      code: { shape: [16], dtype: 'f32' },
      absmax: isNested
        ? { shape: [blocks(N, K)], dtype: 'u8', value: (i) => byte(3 * i) }
        : { shape: [blocks(N, K)], dtype: 'f32', value: (_, normal) => 0.1 + Math.abs(normal()) / 8 },
      ...(isNested && {
        nestedCode: { shape: [256], dtype: 'f32' },
        nestedAbsmax: { shape: [Math.ceil(blocks(N, K) / 256)], dtype: 'f32', value: (_, normal) => normal() / 16 },
      }),
    }),
    weight: (tensors, N, K) =>
      new Weight(N, K, { ...tensors, data: tensors.data as Tensor, blockSize, offset: isNested ? 0.25 : 0 }),
    values: (v, N, K) =>
      Float64Array.from({ length: N * K }, (_, i) => {
        const pair = at(v.data as Float64Array, i >> 1);
        return f(at(v.code as Float64Array, i & 1 ? pair & 15 : pair >> 4) * scales(v, Math.floor(i / blockSize)));
      }),
  };
}

const int8: Kind = {
  name: '8-bit',
  inputs: (N, K) => ({
    data: { shape: [N, K], dtype: 'i8', value: (i) => ((i * 37) % 255) - 127 },
    absmax: { shape: [N], dtype: 'f32', value: (_, normal) => 0.1 + Math.abs(normal()) / 8 },
  }),
  weight: (tensors, N, K) => new Weight(N, K, { data: tensors.data as Tensor, absmax: tensors.absmax }),
  values: (v, _, K) =>
    Float64Array.from(v.data as Float64Array, (q, i) =>
      f(f(q * at(v.absmax as Float64Array, Math.floor(i / K))) * f(1 / 127)),
    ),
};

const dense = (dtype: FloatDType): Kind => ({
  name: `dense ${dtype}`,
  inputs: (N, K) => ({ data: { shape: [N, K], dtype } }),
  weight: (tensors) => Weight.dense(tensors.data as Tensor),
  values: (v) => v.data as Float64Array,
});

/** A [M, K] times B [N, K], transposed. */
function product(A: ArrayLike<number>, B: ArrayLike<number>, M: number, N: number, K: number): Float64Array {
  const C = new Float64Array(M * N);
  for (let m = 0; m < M; m++) {
    for (let n = 0; n < N; n++) {
      let sum = 0;
      for (let k = 0; k < K; k++) sum += at(A, m * K + k) * at(B, n * K + k);
      C[m * N + n] = sum;
    }
  }
  return C;
}

const dtypes = ['f32', 'bf16', 'f16'] as const;
// Dot products and their sums grow with sqrt(K), and so do the largest values that errors are measured against.
const tolerance = { f32: 3e-6, bf16: 6e-3, f16: 1e-3 } as const;

/** Frozen weight: y and dx. */
function frozenCases(kind: Kind, M: number, N: number, K: number): OpCase[] {
  return dtypes.map((dtype) => ({
    name: `matmul ${M} x ${N} x ${K}, ${kind.name}`,
    dtypes: [dtype],
    tolerance,
    inputs: { x: { shape: [M, K], gradient: 'activation' }, bias: { shape: [N] }, ...kind.inputs(N, K) },
    run: (tape, { x, bias, ...rest }) => matmul(tape, x as Tensor, kind.weight(rest, N, K), bias),
    reference: ({ x, bias, ...rest }) => {
      const W = kind.values(rest, N, K).map((w) => roundTo(dtype, w));
      return product(x as Float64Array, W, M, N, K).map((y, i) => y + at(bias as Float64Array, i % N));
    },
  }));
}

/** A trained dense weight: dW and dbias too. */
function trainedCase(M: number, N: number, K: number): OpCase {
  return {
    name: `matmul ${M} x ${N} x ${K}, trained`,
    tolerance,
    inputs: {
      x: { shape: [M, K], gradient: 'activation' },
      weight: { shape: [N, K], dtype: 'f32', gradient: 'parameter' },
      bias: { shape: [N], dtype: 'f32', gradient: 'parameter' },
    },
    run: (tape, { x, weight, bias }) => matmul(tape, x as Tensor, Weight.dense(weight as Tensor), bias),
    reference: ({ x, weight, bias }) =>
      product(x as Float64Array, weight as Float64Array, M, N, K).map((y, i) => y + at(bias as Float64Array, i % N)),
  };
}

function loraCases(kind: Kind, M: number, N: number, K: number, r: number, dropout: number): OpCase[] {
  const [scale, seed, stream] = [2, 11, 5];
  return dtypes.map((dtype) => ({
    name: `loraLinear ${M} x ${N} x ${K}, r ${r}, dropout ${dropout}, ${kind.name}`,
    dtypes: [dtype],
    tolerance: { f32: 4e-6, bf16: 1.2e-2, f16: 2e-3 },
    inputs: {
      x: { shape: [M, K], gradient: 'activation' },
      A: { shape: [r, K], dtype: 'f32', gradient: 'parameter', value: (_, normal) => normal() / 4 },
      B: { shape: [N, r], dtype: 'f32', gradient: 'parameter', value: (_, normal) => normal() / 4 },
      ...kind.inputs(N, K),
    },
    run: (tape, { x, A, B, ...rest }) =>
      loraLinear(tape, x as Tensor, kind.weight(rest, N, K), undefined, {
        A: A as Tensor,
        B: B as Tensor,
        scale,
        dropout,
        seed,
        stream,
      }),
    reference: ({ x, A, B, ...rest }) => {
      const W = kind.values(rest, N, K).map((w) => roundTo(dtype, w));
      const factors = dropoutFactors(M * K, dropout, seed, stream);
      const dropped = (x as Float64Array).map((v, i) => v * (dropout > 0 ? at(factors, i) : 1));
      const T = product(dropped, A as Float64Array, M, r, K);
      const adapter = product(T, B as Float64Array, M, N, r);
      return product(x as Float64Array, W, M, N, K).map((y, i) => y + scale * at(adapter, i));
    },
  }));
}

function doraCase(rows: number, N: number): OpCase {
  return {
    name: `doraScale [${rows}, ${N}]`,
    inputs: {
      z: { shape: [rows, N], gradient: 'activation' },
      magnitude: { shape: [N], dtype: 'f32', gradient: 'parameter' },
      norm: { shape: [N], dtype: 'f32', value: (_, normal) => 0.5 + Math.abs(normal()) },
      bias: { shape: [N] },
    },
    run: (tape, { z, magnitude, norm, bias }) =>
      doraScale(tape, z as Tensor, magnitude as Tensor, norm as Tensor, bias),
    reference: ({ z, magnitude, norm, bias }) =>
      (z as Float64Array).map(
        (v, i) =>
          (v * at(magnitude as Float64Array, i % N)) / at(norm as Float64Array, i % N) +
          at(bias as Float64Array, i % N),
      ),
  };
}

const cases: OpCase[] = [
  ...frozenCases(fourBit(64, true), 1, 70, 192),
  ...frozenCases(fourBit(64, false), 3, 33, 130),
  ...frozenCases(fourBit(32, false), 4, 21, 192), // ends in half a group, and in half a pair of rows
  ...frozenCases(fourBit(128, true), 2, 9, 64),
  ...frozenCases(fourBit(32, true), 13, 20, 128),
  ...frozenCases(fourBit(64, true), 7, 100, 320),
  ...frozenCases(fourBit(4096, false), 35, 40, 200),
  ...frozenCases(fourBit(128, true), 17, 5, 33), // an odd number of weights
  ...frozenCases(fourBit(64, true), 65, 140, 576),
  ...frozenCases(dense('bf16'), 2, 37, 100),
  ...frozenCases(dense('f16'), 40, 19, 65),
  ...frozenCases(dense('bf16'), 5, 37, 328),
  ...frozenCases(dense('bf16'), 70, 72, 104),
  trainedCase(1, 1, 1),
  trainedCase(37, 50, 70),
  trainedCase(5, 130, 3),
  trainedCase(80, 136, 72),
  ...[150, 170].map((N) => trainedCase(40, N, 320 - N)), // more of both than adapters have
  ...loraCases(fourBit(64, true), 1, 64, 128, 8, 0),
  ...loraCases(fourBit(64, true), 37, 96, 192, 16, 0),
  ...loraCases(fourBit(64, false), 9, 50, 75, 5, 0.3),
  ...loraCases(dense('bf16'), 18, 40, 64, 64, 0.1),
  ...loraCases(fourBit(64, true), 66, 72, 96, 72, 0.25),
  // More tiles of a GPU's than the emulated one has multiprocessors; on the CPU it would only take long.
  ...(testDevice === 'cpu' ? [] : loraCases(fourBit(64, true), 300, 264, 64, 8, 0).slice(1, 2)),
  doraCase(3, 70),
];

/** Of the 8-bit layer the gradient alone is that of a product: the forward rounds x to integers. */
async function checkInt8Backward(t: Test): Promise<void> {
  const stream = new Stream(testDevice);
  const [M, N, K] = [5, 33, 70];
  const normal = normalNumbers(3);
  for (const dtype of dtypes) {
    const values: Values = {};
    const tensors: Record<string, Tensor> = {};
    for (const [name, input] of Object.entries(int8.inputs(N, K))) {
      const size = input.shape.reduce((n, d) => n * d, 1);
      values[name] = Float64Array.from({ length: size }, (_, i) =>
        roundTo(input.dtype ?? 'f32', input.value ? input.value(i, normal) : normal()),
      );
      tensors[name] = tensorOf(stream, input.dtype ?? 'f32', input.shape, values[name]);
    }
    const dyValues = Float64Array.from({ length: M * N }, () => roundTo(dtype, normal()));
    const x = tensorOf(stream, dtype, [M, K], new Float64Array(M * K));
    x.requiresGrad = true;
    const tape = new Tape();
    const y = matmul(tape, x, int8.weight(tensors, N, K));
    const dx = tape.backward(y, tensorOf(stream, dtype, [M, N], dyValues), x) as Tensor;
    const W = int8.values(values, N, K).map((w) => roundTo(dtype, w));
    const transposed = Float64Array.from({ length: K * N }, (_, i) => at(W, (i % N) * K + Math.floor(i / N)));
    const expected = product(dyValues, transposed, M, K, N);
    const error = largestError(await dx.read(), expected, Math.max(...expected.map(Math.abs)));
    t.ok(error <= tolerance[dtype], `8-bit dx ${dtype}: error ${error.toExponential(2)}`);
  }
  await stream.close();
}

async function checkRowNorm(t: Test): Promise<void> {
  const stream = new Stream(testDevice);
  const [N, K, r, scale] = [37, 130, 5, 1.5];
  const normal = normalNumbers(5);
  const numbers = (n: number) => Float64Array.from({ length: n }, () => f(normal()));
  const [W, A, B] = [numbers(N * K), numbers(r * K), numbers(N * r)];
  const lora = [tensorOf(stream, 'f32', [r, K], A), tensorOf(stream, 'f32', [N, r], B)] as const;
  for (const dtype of dtypes) {
    const norm = loraRowNorm(Weight.dense(tensorOf(stream, 'f32', [N, K], W)), ...lora, scale, dtype);
    const expected = Float64Array.from({ length: N }, (_, n) => {
      let squares = 0;
      for (let k = 0; k < K; k++) {
        let w = roundTo(dtype, at(W, n * K + k));
        for (let i = 0; i < r; i++) w += scale * at(B, n * r + i) * at(A, i * K + k);
        squares += w * w;
      }
      return Math.sqrt(squares);
    });
    const error = largestError(await norm.read(), expected, Math.max(...expected));
    t.ok(error <= 2e-6, `loraRowNorm ${dtype}: error ${error.toExponential(2)}`);
  }
  await stream.close();
}

interface StoredCase {
  name: string;
  op: string;
  file: string;
  type: 'nf4' | 'fp4';
  blockSize: number;
  computeDtype: FloatDType;
  shape: [number, number, number];
  tensors: Record<string, string>;
}

/** What bitsandbytes' formats demand: forward and dx of 4-bit layers, LLM.int8's forward. */
async function checkReferences(t: Test): Promise<void> {
  const folder = referencesDir('quantization');
  const { cases: all } = readJson<{ cases: StoredCase[] }>(folder, 'index.json');
  const files = new Map<string, ReturnType<typeof readSafetensors>>();
  const stream = new Stream(testDevice);
  for (const c of all) {
    if (c.op !== 'matmul' && c.op !== 'int8-matmul') continue;
    const file = files.get(c.file) ?? readSafetensors(join(folder, c.file));
    files.set(c.file, file);
    const role = (name: string) => file.get(c.tensors[name] as string);
    const values = (name: string) => valuesOf(role(name) as NonNullable<ReturnType<typeof role>>);
    const raw = (name: string, dtype: 'u8' | 'i8') => {
      const { data } = role(name) as { data: Uint8Array };
      return tensorOf(stream, dtype, [data.length], data);
    };
    const floats = (name: string) => tensorOf(stream, 'f32', [values(name).length], values(name));
    const [M, K, N] = c.shape;
    const dtype = c.computeDtype ?? 'f16';
    const x = tensorOf(stream, dtype, [M, K], values(c.op === 'matmul' ? 'x' : 'a'));
    if (c.op === 'int8-matmul') {
      const weight = new Weight(N, K, { data: raw('weight', 'i8').view([N, K]), absmax: floats('SCB') });
      const y = await matmul(undefined, x, weight, undefined, 'f32').read();
      const expected = values('y');
      for (let n = 0; n < N; n++) {
        const column = (from: ArrayLike<number>) => Float64Array.from({ length: M }, (_, m) => at(from, m * N + n));
        const error = largestError(column(y), column(expected), Math.max(...column(expected).map(Math.abs)));
        if (error > 2e-3) t.fail(`${c.name}: feature ${n} is off by ${error.toExponential(2)}`);
      }
      t.equal(y.length, expected.length, c.name);
      continue;
    }
    const double = role('index') && {
      absmax: raw('index', 'u8'),
      nestedAbsmax: floats('nestedAbsmax'),
      nestedCode: dynamicMap(stream, 'signed'),
      offset: at(values('offset'), 0),
    };
    const weight = new Weight(N, K, {
      data: raw('packed', 'u8'),
      code: fourBitCode(stream, c.type),
      blockSize: c.blockSize,
      ...(double ?? { absmax: floats('absmax') }),
    });
    x.requiresGrad = true;
    const tape = new Tape();
    const y = matmul(tape, x, weight);
    const results = { y: await y.read(), dx: new Float32Array() as ArrayLike<number> };
    const dx = tape.backward(y, tensorOf(stream, dtype, [M, N], values('dy')), x) as Tensor;
    results.dx = await dx.read();
    for (const name of ['y', 'dx'] as const) {
      const expected = values(name);
      const error = largestError(results[name], expected, Math.max(...expected.map(Math.abs)));
      t.ok(error <= (dtype === 'f32' ? 3e-6 : 6e-3), `${c.name}: ${name} is off by ${error.toExponential(2)}`);
    }
  }
  await stream.close();
}

await forEachIsa(t, import.meta.url, async () => {
  await t.test('8-bit backward', checkInt8Backward);
  await t.test('row norms', checkRowNorm);
  await t.test('references', checkReferences);
  await checkOps(t, cases);
  const weight = (s: Stream, K: number) => Weight.dense(new Tensor(s, 'f32', [4, K]));
  await checkMisuse(t, [
    {
      name: 'an input of another width',
      run: (s) => matmul(undefined, new Tensor(s, 'f32', [2, 3]), weight(s, 5)),
      code: 'ERR_QLORA_SHAPE',
      message: /x must have shape \[\.\., 5\], got \[2, 3\]/,
    },
    {
      name: 'a bias of another length',
      run: (s) => matmul(undefined, new Tensor(s, 'f32', [2, 5]), weight(s, 5), new Tensor(s, 'f32', [5])),
      code: 'ERR_QLORA_SHAPE',
      message: /bias must have shape \[4\], got \[5\]/,
    },
    {
      name: 'a block size that is no power of two',
      run: (s) => {
        const data = new Tensor(s, 'u8', [10]);
        const absmax = new Tensor(s, 'f32', [1]);
        const bad = new Weight(4, 5, { data, absmax, code: fourBitCode(s, 'nf4'), blockSize: 48 });
        return matmul(undefined, new Tensor(s, 'f32', [2, 5]), bad);
      },
      code: 'ERR_QLORA_ARGUMENT',
      message: /blockSize must be a power of two/,
    },
    {
      name: "a B whose rank is not A's",
      run: (s) =>
        loraLinear(undefined, new Tensor(s, 'f32', [2, 5]), weight(s, 5), undefined, {
          A: new Tensor(s, 'f32', [3, 5]),
          B: new Tensor(s, 'f32', [4, 2]),
          scale: 1,
        }),
      code: 'ERR_QLORA_SHAPE',
      message: /loraB must have shape \[4, 3\], got \[4, 2\]/,
    },
    {
      name: 'a dropout of 1',
      run: (s) =>
        loraLinear(undefined, new Tensor(s, 'f32', [2, 5]), weight(s, 5), undefined, {
          A: new Tensor(s, 'f32', [3, 5]),
          B: new Tensor(s, 'f32', [4, 3]),
          scale: 1,
          dropout: 1,
        }),
      code: 'ERR_QLORA_ARGUMENT',
      message: /dropout must lie in \[0, 1\)/,
    },
  ]);
});
