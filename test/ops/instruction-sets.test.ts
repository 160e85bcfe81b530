// The products of every instruction set against those of portable code, in shapes that fill the blocks of each engine
// and end in the middle of them; and the same bits from 1, 2 and 3 threads.
import { execFileSync, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import t, { type Test } from 'tap';
import { Tape } from '../../lib/autograd.js';
import type { QuantizeOptions } from '../../lib/index.js';
import { native } from '../../lib/native.js';
import { attention } from '../../lib/ops/attention.js';
import { type LoraArguments, loraLinear } from '../../lib/ops/lora-linear.js';
import { matmul } from '../../lib/ops/matmul.js';
import { quantizeWeight } from '../../lib/ops/quantize.js';
import { Weight } from '../../lib/ops/weight.js';
import { type FloatDType, Stream, Tensor } from '../../lib/tensor.js';
import { largestError, normalNumbers, roundTo, tensorOf } from '../support/op-harness.js';
import { packageRoot } from '../support/references.js';

interface Case {
  M: number;
  N: number;
  K: number;
  base: 'nf4' | 'fp4' | 'int8' | FloatDType;
  blockSize?: QuantizeOptions['blockSize'];
  doubleQuant?: boolean;
  dropout?: number;
}

const cases: Case[] = [
  { M: 70, N: 600, K: 320, base: 'nf4', doubleQuant: true },
  { M: 33, N: 577, K: 1088, base: 'nf4' },
  { M: 47, N: 81, K: 256, base: 'fp4', blockSize: 32, doubleQuant: true, dropout: 0.1 },
  { M: 5, N: 33, K: 130, base: 'fp4', blockSize: 128 },
  { M: 19, N: 45, K: 67, base: 'nf4' },
  { M: 4, N: 70, K: 192, base: 'nf4', doubleQuant: true },
  { M: 1, N: 40, K: 96, base: 'int8' },
  { M: 37, N: 67, K: 133, base: 'int8' },
  { M: 18, N: 100, K: 65, base: 'bf16', dropout: 0.1 },
  { M: 66, N: 31, K: 300, base: 'f16' },
  // Few tokens: more columns than their kernels take at a time, and more rows.
  ...[1, 2, 3, 4].map((M): Case => ({ M, N: 140, K: 4224, base: 'nf4', doubleQuant: true })),
  { M: 2, N: 70, K: 4160, base: 'fp4', blockSize: 32, doubleQuant: true },
  { M: 1, N: 37, K: 192, base: 'nf4', blockSize: 32 },
  { M: 3, N: 70, K: 2113, base: 'bf16' },
  { M: 35, N: 40, K: 1472, base: 'nf4' },
];
const r = 5;

/** A native program: code for AMX's tiles, trapped and emulated where there are none, and the table of processors. */
async function checkTiles(t: Test): Promise<void> {
  const built = (part: string) => {
    const folder = join(packageRoot(), 'build', 'CMakeFiles', `${part}.dir`, 'csrc');
    return existsSync(folder)
      ? readdirSync(folder, { recursive: true, encoding: 'utf8' }).map((f) => join(folder, f))
      : [];
  };
  const objects = [
    ...built('kernels_amx').filter((file) => /\/(gemm|attention_\w+)\.cpp\.o$/.test(file)),
    // Whether tiles are emulated the program says itself.
    ...built('core').filter((file) => /\/core\/\w+\.cpp\.o$/.test(file) && !file.endsWith('/wanted_isa.cpp.o')),
  ];
  const compiler = ['c++', 'g++', 'clang++'].find((name) => spawnSync(name, ['--version']).status === 0);
  if (process.platform !== 'linux' || objects.length < 2 || !compiler) {
    t.pass('', { skip: 'needs Linux, a C++ compiler and a build folder with kernels for AMX' });
    return;
  }
  const program = join(t.testdir(), 'tiles_test');
  const source = join(packageRoot(), 'test', 'native', 'tiles_test.cpp');
  const flags = ['-std=c++20', '-O1', `-I${join(packageRoot(), 'csrc')}`, '-DQLORA_ISA=amx', '-DQLORA_ISA_amx=1'];
  execFileSync(compiler, [...flags, source, ...objects, '-lpthread', '-o', program]);
  const { status, stdout, stderr } = spawnSync(program, { encoding: 'utf8' });
  t.equal(status, 0, stderr);
  t.match(stdout, /^tiles (of the processor|by traps)$/m);
}

/** Another order of fp32 sums; the rounding of a result to bf16; that of scores and probabilities, too. */
const allowedErrors = { f32: 1e-6, bf16: 2 ** -8, attention: 1e-2 };
type Kind = keyof typeof allowedErrors;

interface Result {
  name: string;
  kind: Kind;
  values: Float32Array;
}

async function compute(): Promise<Result[]> {
  const stream = new Stream();
  const results: Result[] = [];
  const normal = normalNumbers(7);
  const tensor = (dtype: FloatDType, shape: number[], scale = 1) => {
    const size = shape.reduce((n, d) => n * d, 1);
    return tensorOf(
      stream,
      dtype,
      shape,
      Float64Array.from({ length: size }, () => roundTo(dtype, normal() * scale)),
    );
  };
  for (const { M, N, K, base, blockSize = 64, doubleQuant = false, dropout = 0 } of cases) {
    const name = `${base} ${M} x ${N} x ${K}`;
    const keep = async (part: string, kind: Kind, values: Tensor) => {
      results.push({ name: `${name}: ${part}`, kind, values: (await values.read()) as Float32Array });
    };
    const isQuantized = base === 'nf4' || base === 'fp4' || base === 'int8';
    const W = tensor(isQuantized ? 'f32' : base, [N, K]);
    const weight = isQuantized ? await quantizeWeight(W, { type: base, blockSize, doubleQuant }) : Weight.dense(W);
    const x = tensor('bf16', [M, K]);
    x.requiresGrad = true;
    // f32, so that nothing hides behind the rounding of what is stored.
    await keep('y', 'f32', matmul(undefined, x, weight, tensor('bf16', [N]), 'f32'));
    const adapter: LoraArguments = { A: tensor('f32', [r, K], 0.2), B: tensor('f32', [N, r], 0.2), scale: 2, dropout };
    for (const parameter of [adapter.A, adapter.B]) {
      parameter.requiresGrad = true;
      parameter.gradient = Tensor.from(stream, new Float32Array(parameter.size), parameter.shape);
    }
    const plain = new Tape();
    const dy = tensor('bf16', [M, N]);
    await keep('dx of W', 'bf16', plain.backward(matmul(plain, x, weight), dy, x) as Tensor);
    const tape = new Tape();
    const y = loraLinear(tape, x, weight, undefined, adapter);
    await keep('with adapter', 'bf16', y);
    await keep('dx', 'bf16', tape.backward(y, dy, x) as Tensor);
    await keep('dA', 'bf16', adapter.A.gradient as Tensor);
    await keep('dB', 'bf16', adapter.B.gradient as Tensor);
  }
  const [q, k, v, dout] = [4, 2, 2, 4].map((heads) => tensor('bf16', [1, 45, heads, 64])) as [
    Tensor,
    Tensor,
    Tensor,
    Tensor,
  ];
  for (const [name, wrt] of Object.entries({ q, k, v })) {
    wrt.requiresGrad = true;
    const tape = new Tape();
    const out = attention(tape, q, k, v, { causal: true });
    results.push({
      name: `attention: d${name}`,
      kind: 'attention',
      values: (await tape.backward(out, dout, wrt)?.read()) as Float32Array,
    });
  }
  await stream.close();
  return results;
}

if (process.env.QLORA_CPU) {
  const results = await compute();
  process.stdout.write(
    JSON.stringify(results.map(({ values }) => Buffer.from(Float32Array.from(values).buffer).toString('base64'))),
  );
} else {
  await t.test('code for AMX, and the table of processors', checkTiles);
  const results = await compute();
  const [names, kinds] = [results.map(({ name }) => name), results.map(({ kind }) => kind)];
  const run = (isa: string, threads: number) =>
    execFileSync(process.execPath, [fileURLToPath(import.meta.url)], {
      env: { ...process.env, QLORA_CPU: isa, QLORA_NUM_THREADS: String(threads) },
      encoding: 'utf8',
      maxBuffer: 2 ** 28,
    });
  const floats = (output: string) =>
    (JSON.parse(output) as string[]).map(
      (text) => new Float32Array(new Uint8Array(Buffer.from(text, 'base64')).buffer),
    );
  const digest = (output: string) => createHash('sha256').update(output).digest('hex');
  const expected = floats(run('scalar', 2));
  for (const isa of native.cpu().instructionSets) {
    t.test(isa, async (t) => {
      const output = run(isa, 1);
      for (const threads of [2, 3]) t.equal(digest(run(isa, threads)), digest(output), `${threads} threads`);
      for (const [i, actual] of floats(output).entries()) {
        const reference = expected[i] as Float32Array;
        const error = largestError(actual, reference, Math.max(...reference.map(Math.abs)));
        const allowed = allowedErrors[kinds[i] as Kind];
        t.ok(error <= allowed, `${names[i]}: error ${error.toExponential(2)}, allowed ${allowed.toExponential(2)}`);
      }
    });
  }
}
