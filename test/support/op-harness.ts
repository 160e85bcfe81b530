/**
 * One harness for every operation: a row says how to make inputs, how to call the op, and what it computes, in fp64.
 * The forward result is compared with that reference; each gradient with central differences of the reference.
 */
import { fileURLToPath } from 'node:url';
import { Tape } from '../../lib/autograd.js';
import { native } from '../../lib/native.js';
import { type DType, type FloatDType, Stream, Tensor } from '../../lib/tensor.js';
import { type Test, testDevice } from './testing.js';

export interface OpInput {
  shape: readonly number[];
  /** Default: the dtype under test. 'f32' for parameters and scalars, 'i32' for ids. */
  dtype?: DType;
  /** Values by flat index; default: standard normal. */
  value?: (index: number, normal: () => number) => number;
  /** 'activation' gradients come from the tape, 'parameter' ones are added to `tensor.gradient`. */
  gradient?: 'activation' | 'parameter';
}

export type Values = Record<string, Float64Array>;

export interface OpCase {
  name: string;
  inputs: Record<string, OpInput>;
  /** Calls the op; its first output. */
  run: (tape: Tape, tensors: Record<string, Tensor>) => Tensor;
  /** The same in fp64. */
  reference: (values: Values) => Float64Array;
  /** Default: all three. */
  dtypes?: readonly FloatDType[];
  /** Largest error allowed over the largest |reference|, where the default of the dtype does not fit. */
  tolerance?: Partial<Record<FloatDType, number>>;
}

/** Of forward values; gradients are allowed four times as much. */
const defaultTolerance: Record<FloatDType, number> = { f32: 2e-6, bf16: 8e-3, f16: 1.5e-3 };
// Under emulation (scripts/test-arm64.mjs) the reference takes most of the time.
const sampledGradients = Number(process.env.QLORA_TEST_GRADIENTS ?? 16);

/** Runs body once for each instruction set of this machine, each in a process of its own; on a device here and once. */
export function forEachIsa(t: Test, url: string, body: () => void | Promise<void>): void | Promise<void> {
  if (process.env.QLORA_CPU || testDevice !== 'cpu') return body();
  for (const isa of native.cpu().instructionSets) {
    t.spawn(process.execPath, [fileURLToPath(url)], { env: { ...process.env, QLORA_CPU: isa } }, isa);
  }
}

/** A seeded generator of standard normal numbers. */
export function normalNumbers(seed: number): () => number {
  let state = seed >>> 0 || 1;
  const uniform = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    let x = state;
    x = Math.imul(x ^ (x >>> 16), 0x45d9f3b);
    x = Math.imul(x ^ (x >>> 16), 0x45d9f3b);
    return ((x ^ (x >>> 16)) >>> 0) / 2 ** 32;
  };
  return () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
}

export function roundTo(dtype: DType, x: number): number {
  if (dtype === 'f32') return Math.fround(x);
  if (dtype !== 'bf16' && dtype !== 'f16') return Math.round(x);
  if (x === 0 || !Number.isFinite(x)) return x;
  const [mantissaBits, minimumExponent] = dtype === 'bf16' ? [8, -126] : [11, -14];
  const unit = 2 ** (Math.max(Math.floor(Math.log2(Math.abs(x))), minimumExponent) - mantissaBits + 1);
  const scaled = x / unit;
  const low = Math.floor(scaled);
  const tie = scaled - low === 0.5;
  return (tie ? low + (low % 2 === 0 ? 0 : 1) : Math.round(scaled)) * unit;
}

/** A tensor of `values` rounded to dtype. */
export function tensorOf(stream: Stream, dtype: DType, shape: readonly number[], values: ArrayLike<number>): Tensor {
  if (dtype === 'i32') return Tensor.from(stream, Int32Array.from(values), shape);
  if (dtype === 'u8') return Tensor.from(stream, Uint8Array.from(values), shape);
  if (dtype === 'i8') return Tensor.from(stream, Int8Array.from(values), shape);
  const wide = Tensor.from(stream, Float32Array.from(values), shape);
  if (dtype === 'f32') return wide;
  const narrow = new Tensor(stream, dtype, shape);
  const bits = new Uint16Array(wide.size);
  for (let i = 0; i < bits.length; i++)
    bits[i] = dtype === 'bf16' ? bf16Bits(values[i] as number) : f16Bits(values[i] as number);
  narrow.write(bits).catch(() => {});
  wide.dispose();
  return narrow;
}

const word = new Float32Array(1);
const wordBits = new Uint32Array(word.buffer);

/** Of a value that bf16 holds exactly. */
function bf16Bits(x: number): number {
  word[0] = x;
  return (wordBits[0] as number) >>> 16;
}

/** Of a value that f16 holds exactly. */
function f16Bits(x: number): number {
  const sign = x < 0 || Object.is(x, -0) ? 0x8000 : 0;
  const a = Math.abs(x);
  if (a === Number.POSITIVE_INFINITY) return sign | 0x7c00;
  if (a < 2 ** -14) return sign | (a * 2 ** 24);
  const exponent = Math.floor(Math.log2(a));
  return sign | ((exponent + 15) << 10) | ((a / 2 ** exponent - 1) * 1024);
}

function largest(values: ArrayLike<number>): number {
  let most = 0;
  for (let i = 0; i < values.length; i++)
    if (Number.isFinite(values[i])) most = Math.max(most, Math.abs(values[i] as number));
  return most;
}

/** The largest difference over `scale`; NaN and infinities must agree exactly. */
export function largestError(actual: ArrayLike<number>, expected: ArrayLike<number>, scale: number): number {
  if (actual.length !== expected.length) return Number.POSITIVE_INFINITY;
  let worst = 0;
  for (let i = 0; i < actual.length; i++) {
    const [a, e] = [actual[i] as number, expected[i] as number];
    if (Object.is(a, e) || a === e) continue;
    const error = Math.abs(a - e) / scale;
    worst = Number.isNaN(error) ? Number.POSITIVE_INFINITY : Math.max(worst, error);
  }
  return worst;
}

/** That both hold the same bits; or else how many do not, and how far off they are. */
export async function checkSameBits(t: Test, actual: Tensor, expected: Tensor, what: string): Promise<void> {
  const [a, e] = [await actual.read(), await expected.read()];
  let [first, count] = [-1, 0];
  for (let i = 0; i < e.length; i++) {
    if (Object.is(a[i], e[i])) continue;
    if (count++ === 0) first = i;
  }
  const same = count === 0 && a.length === e.length;
  const off = () =>
    `: ${count} of [${expected.shape}] differ, first [${first}], ${a[first]} for ${e[first]}; error ${largestError(a, e, largest(e)).toExponential(2)}`;
  t.ok(same, `${what}${same ? '' : off()}`);
}

/** Every case in every dtype that it names. */
export async function checkOps(t: Test, cases: readonly OpCase[]): Promise<void> {
  for (const [index, c] of cases.entries()) {
    for (const dtype of c.dtypes ?? (['f32', 'bf16', 'f16'] as const)) {
      await t.test(`${c.name} ${dtype}`, (t) => checkOp(t, c, dtype, index + 1));
    }
  }
}

async function checkOp(t: Test, c: OpCase, dtype: FloatDType, seed: number): Promise<void> {
  const stream = new Stream(testDevice);
  const normal = normalNumbers(seed);
  const values: Values = {};
  const tensors: Record<string, Tensor> = {};
  for (const [name, input] of Object.entries(c.inputs)) {
    const inputDtype = input.dtype ?? dtype;
    const size = input.shape.reduce((n, d) => n * d, 1);
    const filled = Float64Array.from({ length: size }, (_, i) =>
      roundTo(inputDtype, input.value ? input.value(i, normal) : normal()),
    );
    values[name] = filled;
    const tensor = tensorOf(stream, inputDtype, input.shape, filled);
    tensors[name] = tensor;
    if (input.gradient) tensor.requiresGrad = true;
    if (input.gradient === 'parameter') {
      // Not zero, so that a rule that overwrites instead of adding is seen.
      tensor.gradient = Tensor.from(stream, new Float32Array(size).fill(1), input.shape);
    }
  }
  const tolerance = c.tolerance?.[dtype] ?? defaultTolerance[dtype];
  const tape = new Tape();
  const y = c.run(tape, tensors);
  const expected = c.reference(values);
  const scale = largest(expected) || 1;
  const error = largestError(await y.read(), expected, scale);
  t.ok(error <= tolerance, `forward: error ${error.toExponential(2)}, allowed ${tolerance}`);

  const dyDtype = y.dtype as FloatDType;
  const dyValues = Float64Array.from({ length: y.size }, () => roundTo(dyDtype, normal()));
  for (const [name, input] of Object.entries(c.inputs)) {
    if (!input.gradient) continue;
    const again = new Tape();
    const x = tensors[name] as Tensor;
    const out = c.run(again, tensors);
    const dy = tensorOf(stream, dyDtype, y.shape, dyValues);
    const fromTape = again.backward(out, dy, x);
    const gradient = input.gradient === 'parameter' ? x.gradient : fromTape;
    if (!gradient) {
      t.fail(`no gradient of ${name} arrived`);
      continue;
    }
    const analytic = await gradient.read();
    const before = input.gradient === 'parameter' ? 1 : 0;
    if (x.gradient) x.gradient.write(new Float32Array(x.size).fill(1)).catch(() => {});
    for (const [other, o] of Object.entries(c.inputs)) {
      const tensor = tensors[other] as Tensor;
      if (o.gradient === 'parameter') tensor.gradient?.write(new Float32Array(tensor.size).fill(1)).catch(() => {});
    }
    const numeric = numericGradients(c, values, name, dyValues);
    const gradientScale = Math.max(largest(analytic.map((g) => g - before)), largest([...numeric.values()])) || 1;
    let worst = 0;
    for (const [i, g] of numeric)
      worst = Math.max(worst, Math.abs((analytic[i] as number) - before - g) / gradientScale);
    // Adding to the 1 that was there rounds to fp32; differences of the fp64 reference are good to about 1e-7.
    const allowed = 4 * tolerance + 1e-6 + (before * 2 ** -22) / gradientScale;
    t.ok(worst <= allowed, `gradient of ${name}: error ${worst.toExponential(2)}, allowed ${allowed.toExponential(2)}`);
  }
  await stream.close();
}

/** d(sum of dy * y)/d(value) at some elements, by central differences. */
function numericGradients(c: OpCase, values: Values, name: string, dy: Float64Array): Map<number, number> {
  const source = values[name] as Float64Array;
  const result = new Map<number, number>();
  const step = Math.max(1, Math.floor(source.length / sampledGradients));
  for (let i = 0; i < source.length; i += step) {
    const h = 1e-5 * Math.max(1, Math.abs(source[i] as number));
    const objective = (x: number) => {
      const moved = source.slice();
      moved[i] = x;
      const y = c.reference({ ...values, [name]: moved });
      return y.reduce((sum, v, j) => sum + (dy[j] === 0 ? 0 : v * (dy[j] as number)), 0);
    };
    result.set(i, (objective((source[i] as number) + h) - objective((source[i] as number) - h)) / (2 * h));
  }
  return result;
}

export interface MisuseCase {
  name: string;
  run: (stream: Stream) => unknown;
  code: string;
  message: RegExp;
}

/** Each must throw, or reject, a QLoRAError with this code and message. */
export async function checkMisuse(t: Test, cases: readonly MisuseCase[]): Promise<void> {
  for (const c of cases) {
    const stream = new Stream(testDevice);
    await t.rejects(
      async () => {
        await c.run(stream);
      },
      { name: 'QLoRAError', code: c.code, message: c.message },
      c.name,
    );
    await stream.close();
  }
}
