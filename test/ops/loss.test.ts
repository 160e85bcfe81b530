import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { fileURLToPath } from 'node:url';
import { Tape } from '../../lib/autograd.js';
import { zeros } from '../../lib/ops/elementwise.js';
import { embedding } from '../../lib/ops/embedding.js';
import { gradNorm } from '../../lib/ops/grad-norm.js';
import { linearCrossEntropy } from '../../lib/ops/linear-cross-entropy.js';
import { Weight } from '../../lib/ops/weight.js';
import { Stream, Tensor } from '../../lib/tensor.js';
import {
  checkMisuse,
  checkOps,
  forEachIsa,
  largestError,
  normalNumbers,
  type OpCase,
  tensorOf,
  type Values,
} from '../support/op-harness.js';
import t, { testDevice } from '../support/testing.js';

interface Problem {
  M: number;
  V: number;
  C: number;
  h: ArrayLike<number>;
  weight: ArrayLike<number>;
  bias?: ArrayLike<number>;
  labels: ArrayLike<number>;
  scale: number;
  softCap: number;
}

/** Loss and gradients by their formulas, in fp64. */
function crossEntropy({ M, V, C, h, weight, bias, labels, scale, softCap }: Problem) {
  const tokenLoss = new Float64Array(M);
  const dh = new Float64Array(M * C);
  const dweight = new Float64Array(V * C);
  const z = new Float64Array(V);
  const p = new Float64Array(V);
  for (let i = 0; i < M; i++) {
    const label = labels[i] as number;
    if (label === -100) continue;
    for (let v = 0; v < V; v++) {
      let x = bias ? (bias[v] as number) : 0;
      for (let c = 0; c < C; c++) x += (h[i * C + c] as number) * (weight[v * C + c] as number);
      z[v] = softCap ? softCap * Math.tanh(x / softCap) : x;
    }
    let most = Number.NEGATIVE_INFINITY;
    for (const x of z) most = Math.max(most, x);
    let sum = 0;
    for (let v = 0; v < V; v++) {
      p[v] = Math.exp((z[v] as number) - most);
      sum += p[v] as number;
    }
    const logSum = most + Math.log(sum);
    tokenLoss[i] = logSum - (z[label] as number);
    for (let v = 0; v < V; v++) {
      const x = z[v] as number;
      const slope = softCap ? 1 - (x / softCap) ** 2 : 1;
      const dx = scale * ((p[v] as number) / sum - (v === label ? 1 : 0)) * slope;
      for (let c = 0; c < C; c++) {
        dh[i * C + c] = (dh[i * C + c] as number) + dx * (weight[v * C + c] as number);
        dweight[v * C + c] = (dweight[v * C + c] as number) + dx * (h[i * C + c] as number);
      }
    }
  }
  return { loss: scale * tokenLoss.reduce((a, b) => a + b), tokenLoss, dh, dweight };
}

const everyThird = (V: number) => (i: number) => (i % 3 === 1 ? -100 : (i * 7 + V - 1) % V);

const cases: OpCase[] = [
  { M: 13, V: 101, C: 37, softCap: 0, bias: false },
  { M: 5, V: 35, C: 64, softCap: 2, bias: true },
  { M: 1, V: 1, C: 1, softCap: 0, bias: false },
  { M: 6, V: 4097, C: 3, softCap: 30, bias: false },
].map(({ M, V, C, softCap, bias }) => ({
  name: `linearCrossEntropy [${M}, ${C}] to ${V}, soft cap ${softCap}${bias ? ', bias' : ''}`,
  inputs: {
    h: { shape: [M, C], gradient: 'activation' },
    weight: { shape: [V, C], value: (_, normal) => (2 * normal()) / Math.sqrt(C) },
    ...(bias ? { bias: { shape: [V] } } : {}),
    labels: { shape: [M], dtype: 'i32', value: everyThird(V) },
  },
  run: (tape, tensors) => {
    const { h, weight, labels } = tensors as Record<'h' | 'weight' | 'labels', Tensor>;
    return linearCrossEntropy(tape, h, Weight.dense(weight), labels, { scale: 0.37, softCap, bias: tensors.bias });
  },
  reference: ({ h, weight, bias, labels }: Values) => {
    const problem = { M, V, C, scale: 0.37, softCap, bias } as const;
    const [hidden, table, targets] = [h, weight, labels] as [Float64Array, Float64Array, Float64Array];
    return Float64Array.of(crossEntropy({ ...problem, h: hidden, weight: table, labels: targets }).loss);
  },
}));

/** Against the formulas, with every output at once. */
async function checkAll(stream: Stream, M: number, V: number, C: number, softCap: number): Promise<number[]> {
  const normal = normalNumbers(M + V);
  const numbers = (n: number) => Float32Array.from({ length: n }, normal);
  const [h, weight, bias] = [numbers(M * C), numbers(V * C), numbers(V)];
  const labels = Int32Array.from({ length: M }, (_, i) => everyThird(V)(i));
  const scale = 1 / 64;
  const expected = crossEntropy({ M, V, C, h, weight, bias, labels, scale, softCap });

  const x = Tensor.from(stream, h, [M, C]);
  x.requiresGrad = true;
  const W = Tensor.from(stream, weight, [V, C]);
  W.requiresGrad = true;
  W.gradient = Tensor.from(stream, new Float32Array(V * C).fill(0.5), [V, C]);
  const tokenLoss = new Tensor(stream, 'f32', [M]);
  const tape = new Tape();
  const options = { scale, softCap, bias: Tensor.from(stream, bias, [V]), tokenLoss };
  const loss = linearCrossEntropy(tape, x, Weight.dense(W), Tensor.from(stream, labels, [M]), options);
  const dh = tape.backward(loss, Tensor.from(stream, Float32Array.of(2), [1]), x) as Tensor;
  return [
    largestError(await loss.read(), [expected.loss], expected.loss),
    largestError(await tokenLoss.read(), expected.tokenLoss, 10),
    largestError(
      (await dh.read()).map((g) => g / 2),
      expected.dh,
      1 / 64,
    ),
    largestError(
      (await W.gradient.read()).map((g) => g - 0.5),
      expected.dweight,
      1 / 64,
    ),
  ];
}

/** A head [V, C] in each form that a weight has, and its values. */
const heads: Record<string, (stream: Stream, V: number, C: number) => { weight: Weight; values: number[] }> = {
  f32: (s, V, C) => {
    const values = Array.from({ length: V * C }, (_, i) => Math.sin(i));
    return { weight: Weight.dense(tensorOf(s, 'f32', [V, C], values)), values };
  },
  f16: (s, V, C) => {
    const values = Array.from({ length: V * C }, (_, i) => ((i * 37) % 101) / 64 - 0.75);
    return { weight: Weight.dense(tensorOf(s, 'f16', [V, C], values)), values };
  },
  int8: (s, V, C) => {
    const q = Int8Array.from({ length: V * C }, (_, i) => ((i * 37) % 255) - 127);
    const absmax = Float32Array.from({ length: V }, (_, i) => 0.5 + (i % 3) / 4);
    const data = Tensor.from(s, q, [V, C]);
    const values = Array.from(q, (x, i) => (x * (absmax[Math.floor(i / C)] as number)) / 127);
    return { weight: new Weight(V, C, { data, absmax: Tensor.from(s, absmax, [V]) }), values };
  },
  '4-bit': (s, V, C) => fourBitHead(s, V, C, false),
  '4-bit, double quantization': (s, V, C) => fourBitHead(s, V, C, true),
};

/** Blocks of 32, which begin within rows. */
function fourBitHead(s: Stream, V: number, C: number, isNested: boolean) {
  const blocks = Math.ceil((V * C) / 32);
  const packed = Uint8Array.from({ length: (V * C) / 2 }, (_, i) => (i * 57) % 256);
  const code = Float32Array.from({ length: 16 }, (_, i) => i / 8 - 1);
  const index = Uint8Array.from({ length: blocks }, (_, i) => (i * 19) % 256);
  const nestedCode = Float32Array.from({ length: 256 }, (_, i) => i / 256);
  const absmax = Float32Array.from(index, (i) => (nestedCode[i] as number) * 0.5 + 0.25);
  const values = Array.from({ length: V * C }, (_, i) => {
    const both = packed[i >> 1] as number;
    return (code[i % 2 ? both & 15 : both >> 4] as number) * (absmax[i >> 5] as number);
  });
  const weight = new Weight(V, C, {
    data: Tensor.from(s, packed, [packed.length]),
    code: Tensor.from(s, code, [16]),
    blockSize: 32,
    ...(isNested
      ? {
          absmax: Tensor.from(s, index, [blocks]),
          nestedAbsmax: Tensor.from(s, Float32Array.of(0.5), [1]),
          nestedCode: Tensor.from(s, nestedCode, [256]),
          offset: 0.25,
        }
      : { absmax: Tensor.from(s, absmax, [blocks]) }),
  });
  return { weight, values };
}

/** A hash of everything that is summed over many rows or tensors. */
async function digest(): Promise<string> {
  const stream = new Stream(testDevice);
  const normal = normalNumbers(3);
  const numbers = (shape: number[]) =>
    Tensor.from(stream, Float32Array.from({ length: shape.reduce((a, b) => a * b) }, normal), shape);
  const [M, V, C] = [29, 999, 260];
  const table = numbers([V, C]);
  table.requiresGrad = true;
  table.gradient = zeros(stream, [V, C], 'f32');
  const ids = Tensor.from(
    stream,
    Int32Array.from({ length: M }, (_, i) => (i * i) % 7),
    [M],
  );
  const tape = new Tape();
  const h = embedding(tape, table, ids);
  const loss = linearCrossEntropy(tape, h, Weight.dense(table), ids, { scale: 0.1 });
  tape.backward(loss, Tensor.from(stream, Float32Array.of(1), [1]));
  const norm = gradNorm(stream, [table.gradient, numbers([3, 40000]), numbers([1])]);
  const hash = createHash('sha256');
  for (const result of [loss, table.gradient, norm]) hash.update(await result.read());
  await stream.close();
  return hash.digest('hex');
}

if (process.env.QLORA_TEST_DIGEST) {
  process.stdout.write(await digest());
} else {
  await forEachIsa(t, import.meta.url, async () => {
    await checkOps(t, cases);

    await t.test('a loss scale multiplies gradients, not the loss', async (t) => {
      const stream = new Stream(testDevice);
      const results: Float32Array[][] = [];
      for (const factor of [undefined, 1024]) {
        const lossScale = factor && Tensor.from(stream, Float32Array.of(factor), [1]);
        const [h, table] = [
          [3, 5],
          [7, 5],
        ].map((shape, k) => {
          const size = (shape[0] as number) * (shape[1] as number);
          const x = Tensor.from(
            stream,
            Float32Array.from({ length: size }, (_, i) => Math.sin(i + k)),
            shape,
          );
          x.requiresGrad = true;
          x.gradient = zeros(stream, shape, 'f32');
          return x;
        }) as [Tensor, Tensor];
        const labels = Tensor.from(stream, Int32Array.of(1, -100, 6), [3]);
        const tape = new Tape();
        const loss = linearCrossEntropy(tape, h, Weight.dense(table), labels, {
          scale: 0.3,
          lossScale: lossScale || undefined,
        });
        const dh = tape.backward(loss, Tensor.from(stream, Float32Array.of(1), [1]), h) as Tensor;
        results.push(await Promise.all([loss.read(), dh.read(), (table.gradient as Tensor).read()]));
      }
      const [plain, scaled] = results as [Float32Array[], Float32Array[]];
      t.same([...(scaled[0] as Float32Array)], [...(plain[0] as Float32Array)]);
      for (const i of [1, 2])
        t.same(
          [...(scaled[i] as Float32Array)],
          [...(plain[i] as Float32Array)].map((g) => g * 1024),
        );
      t.ok(plain[1]?.some((g) => g !== 0));
      await stream.close();
    });

    await t.test('all results at once, in several chunks of rows', async (t) => {
      const stream = new Stream(testDevice);
      for (const [M, V, C, softCap] of [
        [7, 50, 5, 1.5],
        [680, 20011, 2, 0],
      ] as const) {
        const [loss, tokenLoss, dh, dweight] = (await checkAll(stream, M, V, C, softCap)) as [
          number,
          number,
          number,
          number,
        ];
        t.ok(loss < 1e-6, `loss ${loss}`);
        t.ok(tokenLoss < 1e-6, `tokenLoss ${tokenLoss}`);
        t.ok(dh < 1e-5, `dh ${dh}`);
        t.ok(dweight < 2e-5, `dweight ${dweight}, beside the 0.5 that was there`);
      }
      await stream.close();
    });

    await t.test('a head of every form', async (t) => {
      const [M, V, C] = [9, 70, 12];
      const stream = new Stream(testDevice);
      const h = Array.from({ length: M * C }, (_, i) => ((i * 29) % 64) / 32 - 1);
      const labels = Int32Array.from({ length: M }, (_, i) => everyThird(V)(i));
      for (const [form, make] of Object.entries(heads)) {
        for (const [dtype, allowed] of [
          ['f32', 2e-6],
          ['bf16', 1e-2],
        ] as const) {
          // biome-ignore format: a table
          const { weight, values } = make(stream, V, C);
          const expected = crossEntropy({ M, V, C, h, weight: values, labels, scale: 1, softCap: 0 });
          const x = tensorOf(stream, dtype, [M, C], h);
          x.requiresGrad = true;
          const tape = new Tape();
          const loss = linearCrossEntropy(tape, x, weight, Tensor.from(stream, labels, [M]), { scale: 1 });
          const dh = tape.backward(loss, Tensor.from(stream, Float32Array.of(1), [1]), x) as Tensor;
          const errors = [
            largestError(await loss.read(), [expected.loss], expected.loss),
            largestError(await dh.read(), expected.dh, 1),
          ];
          t.ok(Math.max(...errors) < allowed, `${form} for ${dtype}: ${errors}`);
        }
      }
      await stream.close();
    });

    await t.test('logits are never whole', async (t) => {
      const stream = new Stream(testDevice);
      const [M, V] = [2400, 20011];
      const h = zeros(stream, [M, 2], 'f32');
      const labels = zeros(stream, [M], 'i32');
      const loss = linearCrossEntropy(undefined, h, Weight.dense(zeros(stream, [V, 2], 'f32')), labels, {
        scale: 1 / M,
      });
      t.ok(Math.abs(((await loss.read())[0] as number) - Math.log(V)) < 1e-5);
      t.ok((stream.memory().peakByClass.scratch as number) < 0.5 * M * V * 4);
      await stream.close();
    });

    await t.test('labels of which none counts', async (t) => {
      const stream = new Stream(testDevice);
      const h = Tensor.from(stream, Float32Array.of(1, 2, 3, 4), [2, 2]);
      h.requiresGrad = true;
      const weight = Weight.dense(Tensor.from(stream, Float32Array.of(1, 2), [1, 2]));
      const tape = new Tape();
      const loss = linearCrossEntropy(tape, h, weight, Tensor.from(stream, Int32Array.of(-100, -100), [2]), {
        scale: 1,
      });
      const dh = tape.backward(loss, Tensor.from(stream, Float32Array.of(1), [1]), h) as Tensor;
      t.same([...(await loss.read()), ...(await dh.read())], [0, 0, 0, 0, 0]);
      await stream.close();
    });

    await t.test('far apart logits', async (t) => {
      const stream = new Stream(testDevice);
      const h = Tensor.from(stream, Float32Array.of(1, 1), [2, 1]);
      h.requiresGrad = true;
      const weight = Weight.dense(Tensor.from(stream, Float32Array.of(1e30, -1e30, 0), [3, 1]));
      const tape = new Tape();
      const tokenLoss = new Tensor(stream, 'f32', [2]);
      const labels = Tensor.from(stream, Int32Array.of(0, 2), [2]);
      const loss = linearCrossEntropy(tape, h, weight, labels, { scale: 1, tokenLoss });
      t.same([...(await tokenLoss.read())], [0, Math.fround(1e30)]);
      const dh = tape.backward(loss, Tensor.from(stream, Float32Array.of(1), [1]), h) as Tensor;
      t.same([...(await dh.read())], [0, Math.fround(1e30)]);
      await stream.close();
    });

    const small = (s: Stream, labels: number[]) => ({
      h: tensorOf(s, 'f32', [2, 3], new Float32Array(6)),
      weight: Weight.dense(tensorOf(s, 'f32', [5, 3], new Float32Array(15))),
      labels: Tensor.from(s, Int32Array.from(labels), [labels.length]),
    });
    await checkMisuse(t, [
      ...[5, -1].map((label) => ({
        name: `label ${label} of 5`,
        run: (s: Stream) => {
          const { h, weight, labels } = small(s, [4, label]);
          return linearCrossEntropy(undefined, h, weight, labels, { scale: 1 }).read();
        },
        code: 'ERR_QLORA_TOKEN_ID',
        message: new RegExp(`label ${label} at position 1 is outside the vocabulary of 5`),
      })),
      {
        name: 'too many labels',
        run: (s) => {
          const { h, weight, labels } = small(s, [1, 2, 3]);
          return linearCrossEntropy(undefined, h, weight, labels, { scale: 1 });
        },
        code: 'ERR_QLORA_SHAPE',
        message: /labels must have 2 elements, one a row of h, got \[3\]/,
      },
      {
        name: 'a head of another width',
        run: (s) => {
          const { weight, labels } = small(s, [1, 2]);
          return linearCrossEntropy(undefined, new Tensor(s, 'f32', [2, 4]), weight, labels, { scale: 1 });
        },
        code: 'ERR_QLORA_SHAPE',
        message: /h must have shape \[\.\., 3\], got \[2, 4\]/,
      },
    ]);
  });

  if (!process.env.QLORA_CPU) {
    t.test('the same bits from any number of threads', async (t) => {
      const run = (threads: number) =>
        execFileSync(process.execPath, [fileURLToPath(import.meta.url)], {
          env: { ...process.env, QLORA_NUM_THREADS: String(threads), QLORA_TEST_DIGEST: '1' },
          encoding: 'utf8',
        });
      const alone = run(1);
      t.match(alone, /^[0-9a-f]{64}$/);
      t.equal(run(5), alone);
    });
  }
}
