import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { fileURLToPath } from 'node:url';
import { Tape } from '../../lib/autograd.js';
import { attention } from '../../lib/ops/attention.js';
import { rope, ropeTable } from '../../lib/ops/rope.js';
import { Stream, Tensor } from '../../lib/tensor.js';
import {
  checkMisuse,
  checkOps,
  forEachIsa,
  normalNumbers,
  type OpCase,
  type OpInput,
  tensorOf,
  type Values,
} from '../support/op-harness.js';
import t, { testDevice } from '../support/testing.js';

interface Shape {
  B: number;
  Tq: number;
  S: number;
  H: number;
  Hkv: number;
  D: number;
  keyLength?: number;
  /** By how many keys each batch row has fewer than the one before. */
  fewer?: number;
  causal?: boolean;
  window?: number;
  softCap?: number;
  /** The id of key j of batch row b; queries have that of their position. */
  segment?: (j: number, b: number) => number;
}

const keyLengthOf = (s: Shape, b: number) => (s.keyLength ?? s.S) - b * (s.fewer ?? 0);
const querySegment = (s: Shape, i: number, b: number) =>
  (s.segment as (j: number, b: number) => number)(keyLengthOf(s, b) - s.Tq + i, b);

function sees(s: Shape, b: number, i: number, j: number): boolean {
  const position = keyLengthOf(s, b) - s.Tq + i;
  if (s.causal && j > position) return false;
  if (s.window && j <= position - s.window) return false;
  return !s.segment || (s.segment(j, b) >= 0 && s.segment(j, b) === querySegment(s, i, b));
}

function reference(s: Shape) {
  const { B, Tq, S, H, Hkv, D, softCap } = s;
  const keys = keyLengthOf(s, 0);
  const mask = Array.from({ length: B * Tq }, (_, row) => {
    const b = Math.floor(row / Tq);
    return Uint8Array.from({ length: keys }, (_, j) => Number(j < keyLengthOf(s, b) && sees(s, b, row % Tq, j)));
  });
  return (values: Values): Float64Array => {
    const [q, k, v] = [values.q, values.k, values.v] as [Float64Array, Float64Array, Float64Array];
    const out = new Float64Array(q.length);
    const weights = new Float64Array(keys);
    for (let row = 0; row < B * Tq * H; row++) {
      const seen = mask[Math.floor(row / H)] as Uint8Array;
      const b = Math.floor(row / H / Tq);
      const keyHead = Math.floor((row % H) / (H / Hkv));
      let total = 0;
      for (let j = 0; j < keys; j++) {
        weights[j] = 0;
        if (!seen[j]) continue;
        const at = ((b * S + j) * Hkv + keyHead) * D;
        let score = 0;
        for (let d = 0; d < D; d++) score += (q[row * D + d] as number) * (k[at + d] as number);
        score /= Math.sqrt(D);
        // In fp64 these scores are far from overflow: no maximum is taken off.
        weights[j] = Math.exp(softCap ? softCap * Math.tanh(score / softCap) : score);
        total += weights[j] as number;
      }
      for (let j = 0; j < keys; j++) {
        if (!weights[j]) continue;
        const p = (weights[j] as number) / total;
        const at = ((b * S + j) * Hkv + keyHead) * D;
        for (let d = 0; d < D; d++) out[row * D + d] = (out[row * D + d] as number) + p * (v[at + d] as number);
      }
    }
    return out;
  };
}

function optionsOf(s: Shape, { querySegments, keySegments, pastLength }: Record<string, Tensor>) {
  return {
    causal: s.causal ?? true,
    window: s.window,
    softCap: s.softCap,
    pastLength,
    querySegments,
    keySegments,
  };
}

function attentionCase(shape: Shape): OpCase {
  const s: Shape = { causal: true, ...shape };
  const { B, Tq, S, H, Hkv, D } = s;
  // Gradients are for all S keys.
  const gradient = s.keyLength === undefined ? ({ gradient: 'activation' } as const) : {};
  const segments: Record<string, OpInput> = s.segment
    ? {
        querySegments: { shape: [B, Tq], dtype: 'i32', value: (n) => querySegment(s, n % Tq, Math.floor(n / Tq)) },
        keySegments: { shape: [B, S], dtype: 'i32', value: (n) => s.segment?.(n % S, Math.floor(n / S)) as number },
      }
    : {};
  const { keyLength } = s;
  const past: Record<string, OpInput> =
    keyLength === undefined ? {} : { pastLength: { shape: [B], dtype: 'i32', value: (b) => keyLengthOf(s, b) - Tq } };
  const { segment, ...numbers } = shape;
  return {
    name: `attention ${JSON.stringify(numbers)}${segment ? ' with segments' : ''}`,
    inputs: {
      q: { shape: [B, Tq, H, D], ...gradient },
      k: { shape: [B, S, Hkv, D], ...gradient },
      v: { shape: [B, S, Hkv, D], ...gradient },
      ...segments,
      ...past,
    },
    run: (tape, x) => attention(tape, x.q as Tensor, x.k as Tensor, x.v as Tensor, optionsOf(s, x)),
    reference: reference(s),
    // f16 differs from f32 in its conversions only: small shapes show that.
    dtypes: s.S > 100 ? ['f32', 'bf16'] : ['f32', 'bf16', 'f16'],
    // Sums over dozens of keys of numbers that cancel: an fp32 rounding of the largest is seen in the smallest.
    tolerance: { f32: 4e-6, bf16: 1.2e-2, f16: 2e-3 },
  };
}

const packed = (length: number) => (j: number) => Math.floor(j / length);
const paddedBy = (length: number) => (j: number, b: number) => (j < length - 3 * b ? 0 : -1);

const attentionCases = [
  { B: 1, Tq: 1, S: 1, H: 1, Hkv: 1, D: 1 },
  { B: 2, Tq: 7, S: 7, H: 2, Hkv: 2, D: 12 },
  { B: 1, Tq: 37, S: 37, H: 4, Hkv: 2, D: 20, window: 5 },
  { B: 1, Tq: 33, S: 33, H: 2, Hkv: 1, D: 64, softCap: 1.5 },
  { B: 2, Tq: 33, S: 33, H: 3, Hkv: 1, D: 17, causal: false, segment: paddedBy(30) },
  { B: 1, Tq: 20, S: 45, H: 2, Hkv: 1, D: 80, window: 19 },
  { B: 1, Tq: 45, S: 20, H: 2, Hkv: 2, D: 8 },
  { B: 1, Tq: 18, S: 18, H: 1, Hkv: 1, D: 128, causal: false },
  { B: 1, Tq: 17, S: 17, H: 2, Hkv: 2, D: 256 },
  // More than one block of queries and of keys, a block that one segment fills, and everything at once.
  { B: 1, Tq: 135, S: 135, H: 2, Hkv: 1, D: 5 },
  { B: 1, Tq: 260, S: 260, H: 1, Hkv: 1, D: 1, window: 60 },
  { B: 1, Tq: 260, S: 260, H: 1, Hkv: 1, D: 2, segment: packed(129) },
  { B: 2, Tq: 130, S: 141, H: 2, Hkv: 1, D: 3, window: 90, softCap: 2, segment: packed(50) },
  // Tiles at the causal bound alone, of which a GPU must not take any as seen whole.
  { B: 1, Tq: 200, S: 200, H: 1, Hkv: 1, D: 8 },
  // The same of heads whose rows a GPU copies in pieces of 16 bytes.
  { B: 1, Tq: 260, S: 260, H: 1, Hkv: 1, D: 8, window: 60 },
  { B: 1, Tq: 300, S: 20, H: 1, Hkv: 1, D: 8 },
  // What the first row sees, and the last one no longer, ends one key beside a tile.
  { B: 1, Tq: 130, S: 192, H: 1, Hkv: 1, D: 16 },
  { B: 1, Tq: 130, S: 192, H: 1, Hkv: 1, D: 16, causal: false, window: 125 },
  { B: 1, Tq: 300, S: 300, H: 3, Hkv: 1, D: 16, segment: packed(129) },
  { B: 2, Tq: 130, S: 141, H: 2, Hkv: 1, D: 72, window: 90, softCap: 2, segment: packed(50) },
  // Few queries against a cache with spare room.
  { B: 1, Tq: 1, S: 50, keyLength: 37, H: 4, Hkv: 2, D: 64 },
  { B: 2, Tq: 3, S: 1100, keyLength: 1030, H: 6, Hkv: 2, D: 20, window: 700, softCap: 1.5, segment: packed(600) },
  { B: 2, Tq: 4, S: 9, H: 2, Hkv: 2, D: 33, segment: paddedBy(8) },
  { B: 1, Tq: 40, S: 210, keyLength: 183, H: 2, Hkv: 1, D: 32 },
  // Rows of different length, of which the last has not even one split or block of the first.
  { B: 3, Tq: 1, S: 700, keyLength: 690, fewer: 300, H: 2, Hkv: 1, D: 20 },
  { B: 2, Tq: 20, S: 300, keyLength: 290, fewer: 260, H: 2, Hkv: 1, D: 16, causal: false },
].map(attentionCase);

/** cos and sin of exact angles are inputs here: the table has a test of its own. */
function ropeCase([B, T, H, D, R]: [number, number, number, number, number]): OpCase {
  const angle = (n: number) => (Math.floor(n / (R / 2)) % T) / 10 ** (n % (R / 2));
  return {
    name: `rope [${B}, ${T}, ${H}, ${D}], ${R} of them turning`,
    inputs: {
      x: { shape: [B, T, H, D], gradient: 'activation' },
      cos: { shape: [B * T, R / 2], dtype: 'f32', value: (n) => Math.cos(angle(n)) },
      sin: { shape: [B * T, R / 2], dtype: 'f32', value: (n) => Math.sin(angle(n)) },
    },
    run: (tape, { x, cos, sin }) => rope(tape, x as Tensor, { cos: cos as Tensor, sin: sin as Tensor }),
    reference: (values) => {
      const [x, cos, sin] = [values.x, values.cos, values.sin] as [Float64Array, Float64Array, Float64Array];
      return x.map((value, n) => {
        const d = n % D;
        if (d >= R) return value;
        const first = d < R / 2;
        const at = Math.floor(n / D / H) * (R / 2) + (d % (R / 2));
        const other = x[first ? n + R / 2 : n - R / 2] as number;
        return value * (cos[at] as number) + (first ? -1 : 1) * other * (sin[at] as number);
      });
    },
  };
}

const ropeCases = (
  [
    [2, 5, 3, 8, 8],
    [1, 19, 2, 20, 10],
    [1, 3, 1, 64, 64],
    [1, 2, 2, 6, 2],
  ] as [number, number, number, number, number][]
).map(ropeCase);

/** A digest of what attention computes, forward and backward: the same for any number of threads. */
async function digest(): Promise<string> {
  const stream = new Stream(testDevice);
  const normal = normalNumbers(7);
  const hash = createHash('sha256');
  for (const dtype of ['f32', 'bf16'] as const) {
    const tensor = (heads: number) => {
      const shape = [1, 300, heads, 24];
      const x = tensorOf(stream, dtype, shape, Float32Array.from({ length: 300 * heads * 24 }, normal));
      x.requiresGrad = true;
      return x;
    };
    const [q, k, v, dout] = [tensor(4), tensor(2), tensor(2), tensor(4)];
    for (const wrt of [q, k, v]) {
      const tape = new Tape();
      const out = attention(tape, q, k, v, { causal: true });
      hash.update((await out.read()) as Float32Array);
      hash.update((await tape.backward(out, dout, wrt)?.read()) as Float32Array);
    }
  }
  await stream.close();
  return hash.digest('hex');
}

if (process.env.ATTENTION_DIGEST) {
  process.stdout.write(await digest());
} else {
  if (!process.env.QLORA_CPU) {
    t.test('the same bits with one and with three threads', async (t) => {
      const withThreads = (n: string) =>
        execFileSync(process.execPath, [fileURLToPath(import.meta.url)], {
          env: { ...process.env, ATTENTION_DIGEST: '1', QLORA_NUM_THREADS: n, NODE_OPTIONS: '' },
          encoding: 'utf8',
        });
      const one = withThreads('1');
      t.match(one, /^[0-9a-f]{64}$/);
      t.equal(withThreads('3'), one);
    });
  }

  await forEachIsa(t, import.meta.url, async () => {
    await checkOps(t, attentionCases);
    await checkOps(t, ropeCases);

    await t.test("every query's weights, which sum to 1, arrive at the values", async (t) => {
      const stream = new Stream(testDevice);
      const normal = normalNumbers(3);
      const [T, H, D] = [260, 2, 4];
      const numbers = (heads: number) => Float32Array.from({ length: T * heads * D }, normal);
      for (const window of [0, 60, 33]) {
        const [q, k, v] = [H, 1, 1].map((heads) => Tensor.from(stream, numbers(heads), [1, T, heads, D])) as [
          Tensor,
          Tensor,
          Tensor,
        ];
        v.requiresGrad = true;
        const tape = new Tape();
        const out = attention(tape, q, k, v, { causal: true, window });
        const dout = numbers(H);
        const dv = tape.backward(out, Tensor.from(stream, dout, [1, T, H, D]), v) as Tensor;
        // Of each element of a head, over all queries or keys.
        const sums = (values: Float32Array) => {
          const total = new Array<number>(D).fill(0);
          values.forEach((x, i) => {
            total[i % D] = (total[i % D] as number) + x;
          });
          return total;
        };
        const [got, expected] = [sums(await dv.read()), sums(dout)];
        got.forEach((sum, d) => {
          t.ok(Math.abs(sum - (expected[d] as number)) < 1e-3, `window ${window}: ${sum}, not ${expected[d]}`);
        });
      }
      await stream.close();
    });

    await t.test('ropeTable', async (t) => {
      const stream = new Stream(testDevice);
      const positions = [0, 1, 2, 1000, 131071];
      const frequencies = Float32Array.from([1, 0.5, 1e-4 / 3, 2e-7]);
      const [cos, sin] = [new Tensor(stream, 'f32', [5, 4]), new Tensor(stream, 'f32', [5, 4])];
      const at = Tensor.from(stream, Int32Array.from(positions), [5]);
      ropeTable(at, Tensor.from(stream, frequencies, [4]), 1.25, { cos, sin });
      const [cosines, sines] = [await cos.read(), await sin.read()];
      positions.forEach((position, m) => {
        frequencies.forEach((frequency, r) => {
          const angle = Math.fround(position * frequency);
          const where = `position ${position}, frequency ${frequency}`;
          t.ok(Math.abs((cosines[m * 4 + r] as number) - 1.25 * Math.cos(angle)) < 2e-7, `cos at ${where}`);
          t.ok(Math.abs((sines[m * 4 + r] as number) - 1.25 * Math.sin(angle)) < 2e-7, `sin at ${where}`);
        });
      });
      await stream.close();
    });

    await t.test('gradients against a cache with spare room', async (t) => {
      const stream = new Stream(testDevice);
      const [q, k] = [new Tensor(stream, 'f32', [1, 1, 2, 4]), new Tensor(stream, 'f32', [1, 9, 2, 4])];
      q.requiresGrad = true;
      const pastLength = new Tensor(stream, 'i32', [1]);
      t.throws(() => attention(new Tape(), q, k, k, { causal: true, pastLength }), {
        code: 'ERR_QLORA_ARGUMENT',
        message: /no gradients where pastLength is given/,
      });
      await stream.close();
    });

    const zeros = (s: Stream, shape: readonly number[]) => new Tensor(s, 'f32', shape);
    await checkMisuse(t, [
      {
        name: 'heads that do not divide',
        run: (s) =>
          attention(undefined, zeros(s, [1, 2, 3, 4]), zeros(s, [1, 2, 2, 4]), zeros(s, [1, 2, 2, 4]), {
            causal: true,
          }),
        code: 'ERR_QLORA_SHAPE',
        message: /multiple of that of key heads, got 3 and 2/,
      },
      {
        name: 'a longer cache than there is',
        run: (s) => {
          const x = Tensor.from(s, new Float32Array(16), [1, 2, 2, 4]);
          const pastLength = Tensor.from(s, Int32Array.of(1), [1]);
          return attention(undefined, x, x, x, { causal: true, pastLength }).read();
        },
        code: 'ERR_QLORA_SHAPE',
        message: /pastLength\[0\] must be from 0 to 0, got 1/,
      },
      {
        name: 'segment ids of queries alone',
        run: (s) => {
          const x = zeros(s, [1, 2, 2, 4]);
          attention(undefined, x, x, x, { causal: true, querySegments: Tensor.from(s, new Int32Array(2), [1, 2]) });
        },
        code: 'ERR_QLORA_ARGUMENT',
        message: /both or not at all/,
      },
      {
        name: 'a scale that is not a number',
        run: (s) => {
          const x = zeros(s, [1, 2, 2, 4]);
          attention(undefined, x, x, x, { causal: true, scale: Number.NaN });
        },
        code: 'ERR_QLORA_ARGUMENT',
        message: /scale must be a positive number/,
      },
      {
        name: 'more turning dimensions than a head has',
        run: (s) => rope(undefined, zeros(s, [1, 2, 2, 4]), { cos: zeros(s, [2, 3]), sin: zeros(s, [2, 3]) }),
        code: 'ERR_QLORA_SHAPE',
        message: /turn 6 elements, but a head has only 4/,
      },
      {
        name: 'a table for other tokens',
        run: (s) => rope(undefined, zeros(s, [1, 2, 2, 4]), { cos: zeros(s, [3, 2]), sin: zeros(s, [3, 2]) }),
        code: 'ERR_QLORA_SHAPE',
        message: /cos must have shape \[2, -1\], got \[3, 2\]/,
      },
    ]);
  });
}
