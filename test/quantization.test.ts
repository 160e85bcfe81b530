import { join } from 'node:path';
import t from 'tap';
import type { QLoRAError } from '../lib/errors.js';
import { native } from '../lib/native.js';
import {
  dequantize,
  type QuantizedData,
  type QuantizeOptions,
  quantize,
  resolveQuantizeOptions,
} from '../lib/quantization.js';
import { normalNumbers, roundTo } from './support/op-harness.js';
import { readJson, referencesDir } from './support/references.js';
import { readSafetensors, valuesOf } from './support/safetensors.js';

const folder = referencesDir('quantization');

function gauss(n: number): Float32Array {
  const normal = normalNumbers(7);
  return Float32Array.from({ length: n }, normal);
}

t.test('arrays give the bytes of the references', async (t) => {
  interface Case {
    name: string;
    file: string;
    op: string;
    type: 'nf4' | 'fp4';
    blockSize: NonNullable<QuantizeOptions['blockSize']>;
    shape: number[];
    inputDtype: string;
    input: string;
    tensors: Record<string, string>;
  }
  const { cases } = readJson<{ cases: Case[] }>(folder, 'index.json');
  const chosen = ['shapes.safetensors', 'wide.safetensors'];
  for (const file of chosen) {
    const tensors = readSafetensors(join(folder, file));
    const of = (name: string | undefined) => {
      const found = tensors.get(name ?? '');
      if (!found) throw new Error(`${file} holds no ${name}`);
      return found;
    };
    for (const c of cases.filter((c) => c.op === '4bit' && c.file === file && c.inputDtype === 'f32')) {
      const { type, blockSize } = c;
      const plain = await quantize(valuesOf(of(c.input)), c.shape, { type, blockSize, doubleQuant: false });
      t.same(plain.packed, of(c.tensors.packed).data, `${c.name}: packed`);
      t.same(plain.absmax, of(c.tensors.absmax).data, `${c.name}: absmax`);
      t.same([plain.type, plain.shape, plain.blockSize, plain.nested], [type, c.shape, blockSize, undefined]);
      t.same(await dequantize(plain, 'bf16'), valuesOf(of(c.tensors['out.bf16'])), `${c.name}: out`);
      if (!c.tensors.index) continue;
      const { packed, absmax, nested } = await quantize(valuesOf(of(c.input)), c.shape, { type, blockSize });
      t.same(packed, plain.packed, `${c.name}: packed with double quantization`);
      const index = of(c.tensors.index).data as Uint8Array;
      const nestedAbsmax = valuesOf(of(c.tensors.nestedAbsmax));
      t.same(nested?.absmax, nestedAbsmax, `${c.name}: nestedAbsmax`);
      t.same(
        absmax.map((q, i) => (nestedAbsmax[i >> 8] === 0 ? (index[i] as number) : q)),
        index,
        `${c.name}: index`,
      );
      t.equal(nested?.offset, valuesOf(of(c.tensors.offset))[0], `${c.name}: offset`);
      t.equal(nested?.code.length, 256);
      const data = { ...plain, absmax, nested };
      for (const dtype of ['f32', 'bf16'] as const) {
        const expected = valuesOf(of(c.tensors[`double.out.${dtype}`]));
        t.same(await dequantize(data, dtype), expected, `${c.name}: double.out.${dtype}`);
      }
    }
  }
});

t.test('known answers on N(0, 1) in blocks of 64', async (t) => {
  const v = gauss(2 ** 20);
  const errors = async (options: QuantizeOptions) => {
    const data = await quantize(v, [1024, 1024], options);
    const out = await dequantize(data);
    let [absolute, square] = [0, 0];
    for (const [i, x] of v.entries()) {
      const error = Math.abs(x - (out[i] as number));
      absolute += error / v.length;
      square += error ** 2 / v.length;
    }
    return { absolute, square, bits: data.bitsPerWeight };
  };
  const nf4 = await errors({ doubleQuant: false });
  const double = await errors({});
  const fp4 = await errors({ type: 'fp4', doubleQuant: false });
  t.ok(Math.abs(nf4.absolute - 0.072798) < 4 * 0.000074, `NF4: mean absolute error ${nf4.absolute}`);
  t.ok(Math.abs(fp4.absolute - 0.096543) < 4 * 0.000111, `FP4: mean absolute error ${fp4.absolute}`);
  t.ok(Math.abs(nf4.square - 0.00846) < 5e-5, `NF4: mean square error ${nf4.square}`);
  t.ok(Math.abs(fp4.square - 0.01487) < 8e-5, `FP4: mean square error ${fp4.square}`);
  t.ok(Math.abs(double.square / nf4.square - 1.0005) < 3e-4, `double quantization: ${double.square / nf4.square}`);
  t.same([nf4.bits, double.bits], [4.5, 4 + 8 / 64 + 32 / 16384]);
});

t.test('int8 rows', async (t) => {
  const v = Float32Array.of(1, -0.5, 0.25, 0, 0, 0, 3, 1.5, -3);
  const data = await quantize(v, [1, 3, 3], { type: 'int8' });
  t.same(new Int8Array(data.packed.buffer), Int8Array.of(127, -64, 32, 0, 0, 0, 127, 64, -127));
  t.same([data.absmax, data.blockSize, data.nested], [Float32Array.of(1, 0, 3), 3, undefined]);
  t.ok(Math.abs(data.bitsPerWeight - (8 + 32 / 3)) < 1e-12, 'bits a weight');
  const inverse = Math.fround(1 / 127);
  const expected = Float32Array.from(new Int8Array(data.packed.buffer), (q, i) => {
    const scaled = Math.fround(q * (data.absmax[Math.floor(i / 3)] as number));
    return roundTo('f16', Math.fround(scaled * inverse));
  });
  t.same(await dequantize(data, 'f16'), expected);
});

t.test('nothing but the result stays in memory', async (t) => {
  const before = native.processMemory().liveBytes;
  await dequantize(await quantize(gauss(65536), [256, 256]));
  const left = native.processMemory().liveBytes - before;
  t.ok(left < 4096, `${left} bytes: tables until the garbage collector comes`);
});

t.test('defaults', (t) => {
  t.same(resolveQuantizeOptions(), { type: 'nf4', blockSize: 64, doubleQuant: true });
  t.same(resolveQuantizeOptions({ type: undefined, doubleQuant: false }).doubleQuant, false);
  t.end();
});

t.test('misuse', async (t) => {
  const v = gauss(256);
  const cases: [string, () => Promise<unknown>, string, RegExp, RegExp?][] = [];
  const refused = (name: string, run: () => Promise<unknown>, code: string, message: RegExp, hint?: RegExp) =>
    cases.push([name, run, code, message, hint]);
  const untyped = quantize as (data: unknown, shape: unknown, options?: unknown) => Promise<QuantizedData>;

  refused(
    'block size',
    () => untyped(v, [256], { blockSize: 48 }),
    'ERR_QLORA_OPTION_INVALID',
    /blockSize .*32, .*4096, got 48/,
  );
  refused('type', () => untyped(v, [256], { type: 'nf5' }), 'ERR_QLORA_OPTION_INVALID', /nf4, fp4, int8, got 'nf5'/);
  refused(
    'switch',
    () => untyped(v, [256], { doubleQuant: 'no' }),
    'ERR_QLORA_OPTION_INVALID',
    /true, false, got 'no'/,
  );
  refused(
    'spelling',
    () => untyped(v, [256], { blocksize: 64 }),
    'ERR_QLORA_OPTION_UNKNOWN',
    /'blocksize'/,
    /'blockSize'/,
  );
  refused(
    'nonsense',
    () => untyped(v, [256], { toString: 1 }),
    'ERR_QLORA_OPTION_UNKNOWN',
    /'toString'/,
    /type, blockSize/,
  );
  refused('length', () => quantize(v, [16, 17]), 'ERR_QLORA_SHAPE', /\[16, 17\] must have 272 elements, got 256/);
  refused('no dimensions', () => quantize(v, []), 'ERR_QLORA_SHAPE', /positive integers, got \[\]/);
  refused('a fraction', () => quantize(v, [512, 0.5]), 'ERR_QLORA_SHAPE', /positive integers, got \[512, 0.5\]/);
  refused('no shape', () => untyped(v, undefined), 'ERR_QLORA_SHAPE', /positive integers, got undefined/);
  refused(
    'fp64',
    () => untyped(new Float64Array(4), [4]),
    'ERR_QLORA_ARGUMENT',
    /Float32Array, got an object \(Float64Array\)/,
  );
  const nan = Float32Array.from(v);
  nan[200] = Number.NaN;
  refused('NaN', () => quantize(nan, [256]), 'ERR_QLORA_NON_FINITE', /block 3 \(elements 192 to 255\)/);
  nan[200] = Number.NEGATIVE_INFINITY;
  refused('infinity', () => quantize(nan, [16, 16], { type: 'int8' }), 'ERR_QLORA_NON_FINITE', /row 12 /);

  const data = await quantize(v, [256]);
  const plain = await quantize(v, [256], { doubleQuant: false });
  const int8 = await quantize(v, [256], { type: 'int8' });
  const nested = data.nested as NonNullable<QuantizedData['nested']>;
  const broken: [Partial<QuantizedData>, string, RegExp][] = [
    [{ ...data, packed: data.packed.subarray(1) }, 'ERR_QLORA_SHAPE', /packed must have 128 elements, got 127/],
    [{ ...data, shape: [300] }, 'ERR_QLORA_SHAPE', /packed must have 150 elements, got 128/],
    [{ ...data, blockSize: 128 }, 'ERR_QLORA_SHAPE', /absmax with nested must have 2 elements, got 4/],
    [{ ...data, blockSize: 100 }, 'ERR_QLORA_OPTION_INVALID', /blockSize .*got 100/],
    [{ ...data, nested: undefined }, 'ERR_QLORA_ARGUMENT', /absmax without nested must be a Float32Array/],
    [{ ...plain, nested }, 'ERR_QLORA_ARGUMENT', /absmax with nested must be a Uint8Array/],
    [{ ...data, nested: { ...nested, code: new Float32Array(16) } }, 'ERR_QLORA_SHAPE', /nested.code must have 256/],
    [{ ...data, nested: { ...nested, absmax: new Float32Array(2) } }, 'ERR_QLORA_SHAPE', /nested.absmax must have 1/],
    [{ ...int8, absmax: data.absmax }, 'ERR_QLORA_ARGUMENT', /absmax of int8 data must be a Float32Array/],
    [{ ...data, type: 'int4' as 'int8' }, 'ERR_QLORA_OPTION_INVALID', /nf4, fp4, int8, got 'int4'/],
  ];
  for (const [parts, code, message] of broken) {
    refused(String(message), () => dequantize(parts as QuantizedData), code, message);
  }
  refused('dtype', () => dequantize(data, 'f64' as 'f32'), 'ERR_QLORA_OPTION_INVALID', /f32, bf16, f16, got 'f64'/);
  for (const [name, run, code, message, hint] of cases) {
    await run().then(
      () => t.fail(`${name}: accepted`),
      (error: QLoRAError) => {
        t.match({ ...error, message: error.message }, { name: 'QLoRAError', code, message }, name);
        if (hint) t.match(error.hint, hint, `${name}: hint`);
      },
    );
  }
});
