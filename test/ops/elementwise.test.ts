import { add, cast, dropout, fill, scale, scaleByTensor, zeros } from '../../lib/ops/elementwise.js';
import { embedding } from '../../lib/ops/embedding.js';
import { type Activation, glu } from '../../lib/ops/glu.js';
import { neftune } from '../../lib/ops/neftune.js';
import { selectRows } from '../../lib/ops/select-rows.js';
import { type DType, type FloatDType, Stream, Tensor } from '../../lib/tensor.js';
import {
  checkMisuse,
  checkOps,
  forEachIsa,
  type OpCase,
  roundTo,
  tensorOf,
  type Values,
} from '../support/op-harness.js';
import { dropoutFactors, philox } from '../support/philox.js';
import t, { testDevice } from '../support/testing.js';

const floats: readonly FloatDType[] = ['f32', 'bf16', 'f16'];
const column = (values: Values, name: string) => values[name] as Float64Array;

/** Phi(x) by the series of erf near 0 and the continued fraction of erfc beyond. */
function normalCdf(x: number): number {
  const z = Math.abs(x);
  const density = Math.exp((-z * z) / 2) / Math.sqrt(2 * Math.PI);
  if (z < 3) {
    let term = z;
    let sum = z;
    for (let n = 1; term > 1e-18 * sum; n++) sum += term *= (z * z) / (2 * n + 1);
    return x > 0 ? 0.5 + density * sum : 0.5 - density * sum;
  }
  let fraction = z;
  for (let n = 60; n > 0; n--) fraction = z + n / fraction;
  return x > 0 ? 1 - density / fraction : density / fraction;
}

const activations: Record<Activation, (x: number) => number> = {
  silu: (x) => x / (1 + Math.exp(-x)),
  gelu_pytorch_tanh: (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
  gelu: (x) => x * normalCdf(x),
  relu: (x) => Math.max(x, 0),
};

// More than a chunk of 16,384, and no multiple of any vector.
const wide = [3, 6007];
const odd = [3, 607];
const key = { p: 0.3, seed: 2 ** 40 + 5, stream: 2 ** 33 + 7 };

/** The noise of an array [.., T, C]. */
function neftuneNoise([B, T, C]: readonly [number, number, number]): Float64Array {
  return Float64Array.from({ length: B * T * C }, (_, i) => {
    const [token, c] = [Math.floor(i / C), i % C];
    const counter = Math.floor(token / T) * 2 ** 32 + (token % T) * Math.ceil(C / 4) + Math.floor(c / 4);
    const word = philox(key.seed, key.stream, counter)[c % 4] as number;
    return 2 * ((word >>> 8) / 2 ** 24) - 1;
  });
}

function neftuneCase(shape: readonly [number, number, number]): OpCase {
  const noise = neftuneNoise(shape);
  return {
    name: `neftune of ${shape}`,
    inputs: {
      x: { shape, gradient: 'activation' },
      magnitude: { shape: shape.slice(0, 2), dtype: 'f32', value: (i) => (i % 3) / 4 },
    },
    run: (tape, { x, magnitude }) => neftune(tape, x as Tensor, magnitude as Tensor, key),
    reference: (v) =>
      column(v, 'x').map(
        (x, i) => x + (column(v, 'magnitude')[Math.floor(i / shape[2])] as number) * (noise[i] as number),
      ),
  };
}

const cases: OpCase[] = [
  neftuneCase([1, 1, 1]),
  neftuneCase([2, 5, 67]),
  neftuneCase([3, 20, 130]),
  {
    name: 'add',
    inputs: { a: { shape: wide, gradient: 'activation' }, b: { shape: wide, gradient: 'activation' } },
    run: (tape, { a, b }) => add(tape, a as Tensor, b as Tensor),
    reference: (v) => column(v, 'a').map((a, i) => a + (column(v, 'b')[i] as number)),
  },
  {
    name: 'add of a tensor to itself',
    inputs: { a: { shape: [5], gradient: 'activation' } },
    run: (tape, { a }) => add(tape, a as Tensor, a as Tensor),
    reference: (v) => column(v, 'a').map((a) => 2 * a),
  },
  {
    name: 'scale',
    inputs: { x: { shape: [2, 3, 5, 7], gradient: 'activation' } },
    run: (tape, { x }) => scale(tape, x as Tensor, -1.7),
    reference: (v) => column(v, 'x').map((x) => -1.7 * x),
  },
  {
    name: 'scaleByTensor',
    inputs: { x: { shape: [37], gradient: 'activation' }, factor: { shape: [1], dtype: 'f32', value: () => 0.3 } },
    run: (tape, { x, factor }) => scaleByTensor(tape, x as Tensor, factor as Tensor),
    reference: (v) => column(v, 'x').map((x) => x * (column(v, 'factor')[0] as number)),
  },
  {
    name: 'dropout',
    inputs: { x: { shape: wide, gradient: 'activation' } },
    run: (tape, { x }) => dropout(tape, x as Tensor, key),
    reference: (() => {
      const factors = dropoutFactors(3 * 6007, key.p, key.seed, key.stream);
      return (v: Values) => column(v, 'x').map((x, i) => x * (factors[i] as number));
    })(),
  },
  ...floats.map(
    (to): OpCase => ({
      name: `cast to ${to}`,
      inputs: { x: { shape: [3, 41], gradient: 'activation' } },
      run: (tape, { x }) => cast(tape, x as Tensor, to),
      reference: (v) => column(v, 'x').map((x) => x),
      tolerance: to === 'bf16' ? { f32: 4e-3, f16: 4e-3 } : { f32: 5e-4 },
    }),
  ),
  ...(Object.keys(activations) as Activation[]).map(
    (name): OpCase => ({
      name: `glu ${name}`,
      inputs: {
        gate: { shape: odd, value: (_, normal) => 3 * normal(), gradient: 'activation' },
        up: { shape: odd, gradient: 'activation' },
      },
      run: (tape, { gate, up }) => glu(tape, gate as Tensor, up as Tensor, name),
      reference: (v) => column(v, 'gate').map((g, i) => activations[name](g) * (column(v, 'up')[i] as number)),
    }),
  ),
  ...(
    [
      [[4, 5], 11, 131, 1],
      [[1], 2, 3, 8],
      [[2, 3, 7], 300, 257, 0.5],
    ] as const
  ).map(
    ([ids, V, C, factor]): OpCase => ({
      name: `embedding of [${ids}] in [${V}, ${C}]`,
      inputs: {
        table: { shape: [V, C], gradient: 'parameter' },
        ids: { shape: ids, dtype: 'i32', value: (i) => (i * i + V - 1) % V },
      },
      run: (tape, { table, ids }) => embedding(tape, table as Tensor, ids as Tensor, { scale: factor }),
      reference: (v) =>
        Float64Array.from({ length: column(v, 'ids').length * C }, (_, i) => {
          const row = column(v, 'ids')[Math.floor(i / C)] as number;
          return (column(v, 'table')[row * C + (i % C)] as number) * factor;
        }),
    }),
  ),
  ...[[0], [4], [0, 1, 2, 3, 4], [1, 3], Array.from({ length: 70 }, (_, i) => 3 * i + 1)].map((rows): OpCase => {
    const [M, C] = [Math.max(5, (rows.at(-1) as number) + 2), 11];
    return {
      name: `rows [${rows.slice(0, 5)}] of [${M}, ${C}]`,
      inputs: {
        x: { shape: [M, C], gradient: 'activation' },
        rows: { shape: [rows.length], dtype: 'i32', value: (i) => rows[i] as number },
      },
      run: (tape, { x, rows }) => selectRows(tape, x as Tensor, rows as Tensor),
      reference: (v) =>
        Float64Array.from(
          { length: rows.length * C },
          (_, i) => column(v, 'x')[(rows[Math.floor(i / C)] as number) * C + (i % C)] as number,
        ),
    };
  }),
];

await forEachIsa(t, import.meta.url, async () => {
  await checkOps(t, cases);

  await t.test('fill, in every dtype', async (t) => {
    const stream = new Stream(testDevice);
    for (const dtype of ['f32', 'bf16', 'f16', 'i32', 'u8', 'i8'] as DType[]) {
      const x = zeros(stream, [3, 11001], dtype);
      t.ok((await x.read()).every((v) => v === 0));
      fill(x, 100);
      t.ok(
        (await x.read()).every((v) => v === 100),
        dtype,
      );
    }
    await stream.close();
  });

  await t.test('every 16-bit pattern survives f32, and f32 rounds to nearest even', async (t) => {
    const stream = new Stream(testDevice);
    const patterns = Uint16Array.from({ length: 65536 }, (_, i) => i);
    for (const dtype of ['bf16', 'f16'] as const) {
      const narrow = new Tensor(stream, dtype, [65536]);
      await narrow.write(patterns);
      const wide = cast(undefined, narrow, 'f32');
      const expected = await narrow.read();
      const widened = await wide.read();
      t.equal(
        widened.findIndex((x, i) => !Object.is(x, expected[i])),
        -1,
        'exactly, subnormals and infinities too',
      );
      const nan = Array.from(widened, Number.isNaN);
      const back = (await cast(undefined, wide, dtype).readBits()) as Uint16Array;
      t.ok(back.every((bits, i) => bits === i || nan[i]));
      const nanStays = await cast(undefined, cast(undefined, wide, dtype), 'f32').read();
      t.ok(nanStays.every((x, i) => Number.isNaN(x) === nan[i]));
      // Between every two neighbours: halfway, and one unit of fp32 beside it.
      const finite = Array.from(await wide.read())
        .filter((x) => Number.isFinite(x) && x > 0)
        .sort((a, b) => a - b);
      const between = finite.slice(1).flatMap((high, i) => {
        const middle = Math.fround(((finite[i] as number) + high) / 2);
        return [middle, Math.fround(middle * (1 + 2 ** -23)), -Math.fround(middle * (1 - 2 ** -23))];
      });
      const rounded = await cast(undefined, tensorOf(stream, 'f32', [between.length], between), dtype).read();
      t.equal(
        between.findIndex((x, i) => rounded[i] !== roundTo(dtype, x)),
        -1,
      );
      const huge = await cast(undefined, tensorOf(stream, 'f32', [2], [3.4e38, -3.4e38]), dtype).read();
      t.same([...huge], [Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY]);
    }
    await stream.close();
  });

  await t.test('activations far out', async (t) => {
    const stream = new Stream(testDevice);
    const x = [-3e38, -1e19, -200, -30, 30, 200, 1e19, 3e38];
    for (const name of Object.keys(activations) as Activation[]) {
      const gate = tensorOf(stream, 'f32', [8], x);
      const ones = tensorOf(
        stream,
        'f32',
        [8],
        x.map(() => 1),
      );
      const [dgate, dup] = [new Tensor(stream, 'f32', [8]), new Tensor(stream, 'f32', [8])];
      stream.run('gluBackward', ones, gate, ones, dgate, dup, Object.keys(activations).indexOf(name));
      const slopes = await dgate.read();
      const values = await dup.read();
      for (const [i, at] of x.entries()) {
        const [slope, value] = at < 0 ? [0, 0] : [1, Math.fround(at)];
        t.ok(Math.abs((slopes[i] as number) - slope) < 1e-10, `${name}'(${at}) is ${slopes[i]}`);
        t.ok(Math.abs((values[i] as number) - value) < 1e-10, `${name}(${at}) is ${values[i]}`);
      }
    }
    await stream.close();
  });

  await checkMisuse(t, [
    {
      name: 'a sum of different shapes',
      run: (s) => add(undefined, new Tensor(s, 'f32', [2, 4]), new Tensor(s, 'f32', [4, 2])),
      code: 'ERR_QLORA_SHAPE',
      message: /add: b must have shape \[2, 4\], got \[4, 2\]/,
    },
    {
      name: 'a sum of different dtypes',
      run: (s) => add(undefined, new Tensor(s, 'f32', [2]), new Tensor(s, 'bf16', [2])),
      code: 'ERR_QLORA_DTYPE',
      message: /add: b must be f32, got bf16/,
    },
    {
      name: 'a cast of integers',
      run: (s) => cast(undefined, new Tensor(s, 'i32', [2]), 'f32'),
      code: 'ERR_QLORA_DTYPE',
      message: /cast: x must be f32 or bf16 or f16, got i32/,
    },
    {
      name: 'a fill that does not fit',
      run: (s) => fill(new Tensor(s, 'u8', [2]), 256),
      code: 'ERR_QLORA_ARGUMENT',
      message: /fill: value must fit u8, got 256/,
    },
    ...[
      [1, 3],
      [-1, 0],
      [1, 1],
    ].map((rows) => ({
      name: `rows [${rows}] of three`,
      run: (s: Stream) =>
        selectRows(undefined, zeros(s, [3, 2], 'f32'), Tensor.from(s, Int32Array.from(rows), [2])).read(),
      code: 'ERR_QLORA_ARGUMENT' as const,
      message: /selectRows: rows must ascend from 0 to at most 2, got (3 at 1|-1 at 0|1 at 1)/,
    })),
    {
      name: 'dropout of everything',
      run: (s) => dropout(undefined, new Tensor(s, 'f32', [2]), { p: 1, seed: 0, stream: 0 }),
      code: 'ERR_QLORA_ARGUMENT',
      message: /dropout: p must be at least 0 and less than 1, got 1/,
    },
    {
      name: 'a gate and an up of different shapes',
      run: (s) => glu(undefined, new Tensor(s, 'f32', [2, 4]), new Tensor(s, 'f32', [2, 5]), 'silu'),
      code: 'ERR_QLORA_SHAPE',
      message: /glu: up must have shape \[2, 4\], got \[2, 5\]/,
    },
    ...[-1, 7].map((id) => ({
      name: `id ${id} of 7`,
      run: (s: Stream) => {
        const table = tensorOf(s, 'f32', [7, 2], new Float32Array(14));
        return embedding(undefined, table, Tensor.from(s, Int32Array.of(3, id), [2])).read();
      },
      code: 'ERR_QLORA_TOKEN_ID',
      message: new RegExp(`token id ${id} at position 1 is outside the vocabulary of 7`),
    })),
    {
      name: 'ids that are no integers',
      run: (s) => embedding(undefined, new Tensor(s, 'f32', [7, 2]), new Tensor(s, 'f32', [2])),
      code: 'ERR_QLORA_DTYPE',
      message: /embedding: ids must be i32, got f32/,
    },
  ]);
});
