// Every instruction set, with one, two and three threads, against the stored references and against the rules applied
// to arrays that are long enough for every thread.
import { createHash } from 'node:crypto';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { native } from '../../lib/native.js';
import {
  dequantize8bit,
  dequantizeWeight,
  doubleQuantize,
  dynamicMap,
  fourBitCode,
  quantize4bit,
  quantize8bit,
  quantizeInt8,
  quantizeWeight,
} from '../../lib/ops/quantize.js';
import { Weight } from '../../lib/ops/weight.js';
import { type DType, type FloatDType, Stream, Tensor } from '../../lib/tensor.js';
import { checkMisuse, normalNumbers, roundTo, tensorOf } from '../support/op-harness.js';
import { quantize4bitReference, quantize8bitReference, quantizeInt8Reference } from '../support/quantization-rules.js';
import { readJson, referencesDir } from '../support/references.js';
import { readSafetensors, type StoredTensor, valuesOf } from '../support/safetensors.js';
import t, { type Test, testDevice } from '../support/testing.js';

interface Case {
  name: string;
  file: string;
  op: string;
  type: 'nf4' | 'fp4';
  blockSize: number;
  map: 'signed' | 'unsigned';
  shape: number[];
  /** Of 4bit: the name of the input, which many cases share. */
  input?: string;
  tensors: Record<string, string>;
}

const folder = referencesDir('quantization');
const files = new Map<string, Map<string, StoredTensor>>();
const dtypes: Partial<Record<StoredTensor['dtype'], DType>> = {
  F32: 'f32',
  BF16: 'bf16',
  F16: 'f16',
  U8: 'u8',
  I8: 'i8',
};
const floatDTypes = ['f32', 'bf16', 'f16'] as const;

function stored(file: string, name: string): StoredTensor {
  if (!files.has(file)) files.set(file, readSafetensors(join(folder, file)));
  const tensor = files.get(file)?.get(name);
  if (!tensor) throw new Error(`${file} holds no ${name}`);
  return tensor;
}

/** The first index at which they differ, or -1. -0 equals 0. */
function firstDifference(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  for (let i = 0; i < Math.max(actual.length, expected.length); i++) if (actual[i] !== expected[i]) return i;
  return -1;
}

async function checkEqual(t: Test, actual: Tensor | ArrayLike<number>, expected: ArrayLike<number>, what: string) {
  t.equal(firstDifference(actual instanceof Tensor ? await actual.read() : actual, expected), -1, what);
}

/** Indices are not determined in a block that is zero: there the reference's are taken. */
function determined(index: ArrayLike<number>, reference: ArrayLike<number>, absmax: ArrayLike<number>): number[] {
  return Array.from(index, (q, i) => (absmax[i >> 8] === 0 ? (reference[i] as number) : q));
}

function uploaded(stream: Stream, { dtype, shape, data }: StoredTensor): Tensor {
  const tensor = new Tensor(stream, dtypes[dtype] as DType, shape);
  tensor.write(data as Float32Array).catch(() => {});
  return tensor;
}

const values = (c: Case, role: string) => valuesOf(stored(c.file, c.tensors[role] as string));
const bytes = (c: Case, role: string) => stored(c.file, c.tensors[role] as string).data as Uint8Array;

async function checkNested(t: Test, stream: Stream, c: Case, absmax: Tensor): Promise<Weight['tensors']> {
  const { index, nestedAbsmax, offset } = doubleQuantize(absmax);
  await checkEqual(t, nestedAbsmax, values(c, 'nestedAbsmax'), `${c.name}: nestedAbsmax`);
  await checkEqual(t, offset, values(c, 'offset'), `${c.name}: offset`);
  const [mean] = await offset.read();
  const indices = determined(await index.read(), bytes(c, 'index'), values(c, 'nestedAbsmax'));
  await checkEqual(t, indices, bytes(c, 'index'), `${c.name}: index`);
  const back = (await dequantize8bit(index, nestedAbsmax, 'signed').read()).map((v) => v + (mean as number));
  await checkEqual(t, back, values(c, 'absmaxBack'), `${c.name}: absmaxBack`);
  if (c.tensors['cpu.index']) {
    const [theirs, top] = ['cpu.index', 'cpu.nestedAbsmax'].map((role) =>
      uploaded(stream, stored(c.file, c.tensors[role] as string)),
    );
    const [theirMean] = values(c, 'cpu.offset');
    const theirBack = await dequantize8bit(theirs as Tensor, top as Tensor, 'signed').read();
    const sum = theirBack.map((v) => v + (theirMean as number));
    await checkEqual(t, sum, values(c, 'cpu.absmaxBack'), `${c.name}: bitsandbytes' absmaxBack`);
  }
  return { data: index, absmax: index, nestedAbsmax, nestedCode: dynamicMap(stream, 'signed'), offset: mean };
}

async function checkFourBit(t: Test, stream: Stream, c: Case): Promise<void> {
  const x = uploaded(stream, stored(c.file, (c.input ?? c.tensors.input) as string));
  const { packed, absmax } = quantize4bit(x, c.type, c.blockSize);
  await checkEqual(t, packed, bytes(c, 'packed'), `${c.name}: packed`);
  await checkEqual(t, absmax, values(c, 'absmax'), `${c.name}: absmax`);
  const K = c.shape.at(-1) as number;
  const plain = { data: packed, absmax, code: fourBitCode(stream, c.type), blockSize: c.blockSize };
  const nested = c.tensors.index ? { ...plain, ...(await checkNested(t, stream, c, absmax)), data: packed } : plain;
  for (const role of Object.keys(c.tensors)) {
    const [, double, dtype] = /^(double\.)?out\.(.*)$/.exec(role) ?? [];
    if (!dtype) continue;
    const weight = new Weight(x.size / K, K, double ? nested : plain);
    await checkEqual(t, dequantizeWeight(weight, dtype as FloatDType), values(c, role), `${c.name}: ${role}`);
  }
}

async function checkCase(t: Test, stream: Stream, c: Case): Promise<void> {
  if (c.op === '4bit') return checkFourBit(t, stream, c);
  const x = uploaded(stream, stored(c.file, (c.input ?? c.tensors.input) as string));
  if (c.op === 'nested') {
    await checkNested(t, stream, c, x);
  } else if (c.op === '8bit') {
    const { index, absmax } = quantize8bit(x, c.map);
    await checkEqual(t, absmax, values(c, 'absmax'), `${c.name}: absmax`);
    const indices = determined(await index.read(), bytes(c, 'index'), values(c, 'absmax'));
    await checkEqual(t, indices, bytes(c, 'index'), `${c.name}: index`);
    await checkEqual(t, dequantize8bit(index, absmax, c.map), values(c, 'out'), `${c.name}: out`);
  } else {
    const { q, absmax } = quantizeInt8(x);
    await checkEqual(t, q, bytes(c, 'q'), `${c.name}: q`);
    await checkEqual(t, absmax, values(c, 'SCB'), `${c.name}: SCB`);
    const weight = new Weight(x.dim(0), x.dim(1), { data: q, absmax });
    await checkEqual(t, dequantizeWeight(weight, 'f32'), values(c, 'out.f32'), `${c.name}: out`);
  }
}

/** n values of dtype over many magnitudes, some zero. */
function sample(n: number, dtype: FloatDType, seed: number): Float32Array {
  const normal = normalNumbers(seed);
  return Float32Array.from({ length: n }, (_, i) =>
    i % 1000 < 70 ? 0 : roundTo(dtype, normal() * 2 ** -(Math.floor(i / 500) % 12)),
  );
}

async function checkLong(t: Test, stream: Stream): Promise<void> {
  const n = 140_001;
  const map = (name: string) => valuesOf(stored('maps.safetensors', name));
  const codes = { nf4: map('nf4'), fp4: map('fp4') };
  for (const [seed, dtype] of floatDTypes.entries()) {
    const v = sample(n, dtype, seed + 1);
    const x = tensorOf(stream, dtype, [3, n / 3], v);
    for (const type of ['nf4', 'fp4'] as const) {
      for (const blockSize of [32, 64, 4096]) {
        const what = `${type}, ${dtype}, blocks of ${blockSize}`;
        const expected = quantize4bitReference(v, type, blockSize, codes.nf4);
        const { packed, absmax } = quantize4bit(x, type, blockSize);
        await checkEqual(t, packed, expected.packed, `${what}: packed`);
        await checkEqual(t, absmax, expected.absmax, `${what}: absmax`);
        const weight = new Weight(3, n / 3, { data: packed, absmax, code: fourBitCode(stream, type), blockSize });
        const out = Float64Array.from(v, (_, i) => {
          const code = ((expected.packed[i >> 1] as number) >> (i % 2 ? 0 : 4)) & 15;
          const scale = expected.absmax[Math.floor(i / blockSize)] as number;
          return roundTo(dtype, Math.fround((codes[type][code] as number) * scale));
        });
        await checkEqual(t, dequantizeWeight(weight, dtype), out, `${what}: out`);
      }
    }
    const half = sample(n, 'f16', 4);
    const halves = tensorOf(stream, 'f16', [3, n / 3], half);
    const rows = quantizeInt8Reference(half, n / 3);
    const { q, absmax } = quantizeInt8(halves);
    await checkEqual(t, q, rows.q, 'int8: q');
    await checkEqual(t, absmax, rows.absmax, 'int8: absmax');
    const weight = new Weight(3, n / 3, { data: q, absmax });
    const inverse = Math.fround(1 / 127);
    const out = Float64Array.from(rows.q, (v, i) => {
      const product = Math.fround(v * (rows.absmax[Math.floor(i / (n / 3))] as number));
      return roundTo(dtype, Math.fround(product * inverse));
    });
    await checkEqual(t, dequantizeWeight(weight, dtype), out, `int8 to ${dtype}`);
    for (const other of floatDTypes) {
      const cast = Float64Array.from(v, (value) => roundTo(other, value));
      await checkEqual(t, dequantizeWeight(Weight.dense(x), other), cast, `dense ${dtype} to ${other}`);
    }
  }
  for (const kind of ['signed', 'unsigned'] as const) {
    const v = sample(n, 'f32', 5).map((value) => (kind === 'signed' ? value : Math.abs(value)));
    const expected = quantize8bitReference(v, map(`dynamic_${kind}`));
    const { index, absmax } = quantize8bit(Tensor.from(stream, v, [n]), kind);
    await checkEqual(t, index, expected.index, `8 bits, ${kind}: index`);
    await checkEqual(t, absmax, expected.absmax, `8 bits, ${kind}: absmax`);
  }
  const maxima = sample(n, 'f32', 6).map(Math.abs);
  const { index, nestedAbsmax, offset } = doubleQuantize(Tensor.from(stream, maxima, [n]));
  const mean = Math.fround(maxima.reduce((sum, v) => sum + v, 0) / n);
  const expected = quantize8bitReference(
    maxima.map((v) => v - mean),
    map('dynamic_signed'),
  );
  await checkEqual(t, offset, [mean], 'double quantization: offset');
  await checkEqual(t, index, expected.index, 'double quantization: index');
  await checkEqual(t, nestedAbsmax, expected.absmax, 'double quantization: nestedAbsmax');
}

/** Maxima, which the code 1 gives back, that lie just beside, on and between the values of 16-bit types. */
async function checkRounding(t: Test, stream: Stream): Promise<void> {
  const bits = [0x3f800000, 0x3f810000, 0x00010000, 0x00020000, 0x38800000, 0x38802000, 0x33800000, 0x34000000].flatMap(
    (base) => [0, 0x0fff, 0x1000, 0x1001, 0x3000, 0x7fff, 0x8000, 0x8001, 0xffff].map((low) => base + low),
  );
  const maxima = new Float32Array(Uint32Array.from(bits).buffer);
  for (const sign of [1, -1]) {
    // One code a block for 1 or -1, at a place of its own; the others are 7, for 0.
    const v = new Float32Array(32 * maxima.length);
    const packed = new Uint8Array(v.length / 2).fill(0x77);
    for (const [i, top] of maxima.entries()) {
      const at = 32 * i + (i % 32);
      v[at] = sign * top;
      const code = sign > 0 ? 15 : 0;
      packed[at >> 1] = at % 2 ? 0x70 | code : (code << 4) | 7;
    }
    const weight = new Weight(1, v.length, {
      data: Tensor.from(stream, packed, [packed.length]),
      absmax: Tensor.from(stream, maxima, [maxima.length]),
      code: fourBitCode(stream, 'nf4'),
      blockSize: 32,
    });
    for (const dtype of floatDTypes) {
      const expected = Float64Array.from(v, (value) => roundTo(dtype, value));
      await checkEqual(t, dequantizeWeight(weight, dtype), expected, `to ${dtype}, sign ${sign}`);
    }
  }
  const large = await quantizeWeight(Tensor.from(stream, Float32Array.of(65519, 0, 65520, -65520), [2, 2]), {
    type: 'nf4',
    blockSize: 32,
    doubleQuant: false,
  });
  await checkEqual(t, dequantizeWeight(large, 'f16'), [Infinity, 0, Infinity, -Infinity], 'beyond fp16');
}

async function checkTables(t: Test, stream: Stream): Promise<void> {
  for (const type of ['nf4', 'fp4'] as const) {
    await checkEqual(t, fourBitCode(stream, type), valuesOf(stored('maps.safetensors', type)), type);
  }
  const sha256 = { signed: /^e732639a65f497b4/, unsigned: /^305f002cc11278fb/ };
  for (const kind of ['signed', 'unsigned'] as const) {
    const map = await dynamicMap(stream, kind).read();
    t.match(createHash('sha256').update(map).digest('hex'), sha256[kind], `${kind} map`);
    t.equal(map.indexOf(0), kind === 'signed' ? 127 : 0, `${kind} map: zero`);
  }
  t.equal(dynamicMap(stream, 'signed'), dynamicMap(stream, 'signed'), 'tables are shared');
}

async function checkNonFinite(t: Test, stream: Stream): Promise<void> {
  const error = (message: RegExp) => ({ name: 'QLoRAError', code: 'ERR_QLORA_NON_FINITE', message });
  const fourBit = { type: 'nf4', blockSize: 64, doubleQuant: false } as const;
  for (const dtype of floatDTypes) {
    for (const [bad, at] of [
      [Number.NaN, 200],
      [Number.POSITIVE_INFINITY, 0],
      [Number.NEGATIVE_INFINITY, 6 * 70 - 1],
    ] as const) {
      const v = new Float32Array(6 * 70).fill(0.5);
      v[at] = bad;
      const x = new Tensor(stream, dtype, [6, 70]);
      const bits = new Uint32Array(v.buffer);
      const f16 = Uint16Array.from(v, (value) => (Number.isNaN(value) ? 0x7e00 : value === 0.5 ? 0x3800 : 0x7c00));
      x.write(dtype === 'f32' ? v : dtype === 'f16' ? f16 : Uint16Array.from(bits, (b) => b >>> 16)).catch(() => {});
      const block = Math.floor(at / 64);
      const elements = `block ${block} \\(elements ${block * 64} to ${Math.min(420, block * 64 + 64) - 1}\\)`;
      for (const doubleQuant of [false, true]) {
        const options = { ...fourBit, doubleQuant };
        await t.rejects(quantizeWeight(x, options), error(new RegExp(elements)), `${bad} in ${dtype}, 4 bits`);
      }
      const row = new RegExp(`row ${Math.floor(at / 70)} `);
      await t.rejects(quantizeWeight(x, { ...fourBit, type: 'int8' }), error(row), `${bad} in ${dtype}, int8`);
    }
  }
  const large = Tensor.from(stream, Float32Array.of(1, 2, 3, 65520), [2, 2]);
  await t.rejects(quantizeInt8(large).q.read(), error(/row 1 .*fp16/), 'beyond fp16');
  const zeros = await quantizeWeight(Tensor.from(stream, new Float32Array(96), [2, 48]), {
    ...fourBit,
    doubleQuant: true,
  });
  t.same(await dequantizeWeight(zeros, 'f32').read(), new Float32Array(96), 'zeros stay zeros');
}

const tensor = (stream: Stream, dtype: DType, ...shape: number[]) => new Tensor(stream, dtype, shape);
const misuse = [
  {
    name: 'a block size that is no power of two',
    run: (s: Stream) => quantize4bit(tensor(s, 'f32', 96), 'nf4', 48),
    code: 'ERR_QLORA_ARGUMENT',
    message: /blockSize must be a power of two from 32 to 4096/,
  },
  {
    name: 'ids as weights',
    run: (s: Stream) => quantize4bit(tensor(s, 'i32', 96), 'nf4', 64),
    code: 'ERR_QLORA_DTYPE',
    message: /x must be f32 or bf16 or f16, got i32/,
  },
  {
    name: 'too few bytes for the codes',
    run: (s: Stream) => s.run('quantize4bit', tensor(s, 'f32', 65), tensor(s, 'u8', 32), tensor(s, 'f32', 2), 0, 64),
    code: 'ERR_QLORA_SHAPE',
    message: /packed must have shape \[33\], got \[32\]/,
  },
  {
    name: 'an unknown type',
    run: (s: Stream) => s.run('quantize4bit', tensor(s, 'f32', 64), tensor(s, 'u8', 32), tensor(s, 'f32', 1), 2, 64),
    code: 'ERR_QLORA_ARGUMENT',
    message: /type must be 0 \(NF4\) or 1 \(FP4\)/,
  },
  {
    name: '8 bits of a bf16 tensor',
    run: (s: Stream) => quantize8bit(tensor(s, 'bf16', 64), 'signed'),
    code: 'ERR_QLORA_DTYPE',
    message: /x must be f32, got bf16/,
  },
  {
    name: 'maxima of another number of blocks',
    run: (s: Stream) => dequantize8bit(tensor(s, 'u8', 300), tensor(s, 'f32', 1), 'signed'),
    code: 'ERR_QLORA_SHAPE',
    message: /absmax must have shape \[2\], got \[1\]/,
  },
  {
    name: 'int8 of a vector',
    run: (s: Stream) => quantizeInt8(tensor(s, 'f32', 64)),
    code: 'ERR_QLORA_SHAPE',
    message: /x must have shape/,
  },
  {
    name: 'a 4-bit weight without its code',
    run: (s: Stream) =>
      dequantizeWeight(
        new Weight(2, 32, { data: tensor(s, 'u8', 32), absmax: tensor(s, 'f32', 1), blockSize: 64 }),
        'f32',
      ),
    code: 'ERR_QLORA_SHAPE',
    message: /code must have shape \[16\]/,
  },
];

if (process.env.QLORA_CPU || testDevice !== 'cpu') {
  const stream = new Stream(testDevice);
  const { cases } = readJson<{ cases: Case[] }>(folder, 'index.json');
  await t.test('tables', (t) => checkTables(t, stream));
  for (const op of ['4bit', 'nested', '8bit', 'int8']) {
    const ours = cases.filter((c) => c.op === op);
    await t.test(`references: ${op}`, async (t) => {
      t.ok(ours.length > 0, `${ours.length} cases`);
      for (const c of ours) await checkCase(t, stream, c);
    });
  }
  await t.test('long arrays', (t) => checkLong(t, stream));
  await t.test('rounding to 16 bits', (t) => checkRounding(t, stream));
  await t.test('values that are not finite', (t) => checkNonFinite(t, stream));
  await t.test('misuse', (t) => checkMisuse(t, misuse));
  await stream.close();
} else {
  const isas = native.cpu().instructionSets;
  for (let i = 0; i < Math.max(3, isas.length); i++) {
    const [isa, threads] = [isas[i % isas.length] as string, String((i % 3) + 1)];
    const env = { ...process.env, QLORA_CPU: isa, QLORA_NUM_THREADS: threads };
    t.spawn(process.execPath, [fileURLToPath(import.meta.url)], { env }, `${isa}, ${threads} threads`);
  }
}
