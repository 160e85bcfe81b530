/** Every rule against the traces of test/references/optimizers, on each instruction set. */
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { fileURLToPath } from 'node:url';
import { native } from '../lib/native.js';
import { zeros } from '../lib/ops/elementwise.js';
import { gradNorm } from '../lib/ops/grad-norm.js';
import { finishStep, type OptimizerOp, optimizerStep, ruleOf, type StepOptions } from '../lib/ops/optimizer.js';
import { Stream, Tensor } from '../lib/tensor.js';
import { checkMisuse, forEachIsa, normalNumbers } from './support/op-harness.js';
import {
  clipping,
  counters,
  exact,
  gradientOf,
  index,
  largestGradient,
  lastStep,
  Run,
  readAll,
  reference,
  stored,
  type Trace,
  worst,
} from './support/optimizer-traces.js';
import { valuesOf } from './support/safetensors.js';
import t, { type Test, testDevice } from './support/testing.js';

async function checkTrace(t: Test, trace: Trace): Promise<void> {
  const { size } = trace;
  const stream = new Stream(testDevice);
  const run = new Run(stream, trace);
  const eight = run.op.endsWith('8bit');
  for (let step = 1; step <= lastStep; step++) {
    run.step(gradientOf(trace, step));
    const at = trace.steps.indexOf(step);
    if (at < 0) continue;
    const actual = await readAll(run.params);
    const expected = reference(trace.param).slice(at * size, (at + 1) * size);
    if (eight) {
      checkClose(t, actual, expected, `step ${step}`);
      if (exact) t.ok(Buffer.from(actual.buffer).equals(Buffer.from(expected.buffer)), `step ${step}: equal bits`);
    } else {
      const error = worst(actual, expected);
      t.ok(error <= 1, `step ${step}: ${error.toFixed(3)} of what is allowed`);
    }
  }
  for (const [name, expected] of Object.entries(trace.finalState ?? {})) {
    const summed = name === 'v' ? undefined : largestGradient(trace);
    t.ok(worst(await readAll(run.state.get(name) as Tensor[]), reference(expected), summed) <= 1, name);
  }
  const peer = trace['cpu.param'];
  if (trace.name.includes('-wild')) {
    const start = reference(trace.start);
    const moved = (await readAll(run.params)).reduce(
      (most, p, i) => Math.max(most, Math.abs(p - (start[i] as number))),
      0,
    );
    t.ok(moved <= 2e-2, `no parameter moves far: ${moved}`);
  } else if (peer) {
    checkClose(t, await readAll(run.params), reference(peer), 'bitsandbytes on the CPU');
  }
  await stream.close();
}

/** What the references allow over a whole trace in 8 bits. */
function checkClose(t: Test, actual: Float32Array, expected: Float32Array, what: string): void {
  const errors = actual.map((a, i) => Math.abs(a - (expected[i] as number)));
  const mean = errors.reduce((a, b) => a + b, 0) / errors.length;
  t.ok(mean <= 2e-6, `${what}: mean error ${mean}`);
  t.ok(Math.max(...errors) <= 5e-4, `${what}: largest error ${Math.max(...errors)}`);
}

/** One step at a time from the stored state: errors do not add up. */
async function checkSteps(t: Test, trace: Trace): Promise<void> {
  const { size } = trace;
  for (const [at, step] of trace.steps.entries()) {
    if (trace.steps[at + 1] !== step + 1) continue;
    const stream = new Stream(testDevice);
    const run = new Run(stream, trace);
    const [param] = run.params as [Tensor];
    await param.write(reference(trace.param).slice(at * size, (at + 1) * size));
    await run.counted.counters.write(Int32Array.of(step, step));
    const rows = (name: string, row: number) => {
      const { shape, data } = stored((trace.state as Record<string, string>)[name] as string);
      const n = shape[1] as number;
      return data.slice(row * n, (row + 1) * n) as Uint8Array | Float32Array;
    };
    for (const [name, [tensor]] of run.state) await (tensor as Tensor).write(rows(name, at));
    run.step(gradientOf(trace, step + 1));
    const error = worst(await param.read(), reference(trace.param).slice((at + 1) * size, (at + 2) * size));
    t.ok(error <= 1, `step ${step + 1}: ${error.toFixed(3)} of what is allowed`);
    for (const [name, [tensor]] of run.state) {
      const [actual, expected] = [await (tensor as Tensor).read(), rows(name, at + 1)];
      const off = actual.map((a, i) => Math.abs(a - (expected[i] as number)));
      if (name.endsWith('.absmax')) {
        t.ok(
          off.every((d, i) => d <= 1e-6 * Math.abs(expected[i] as number)),
          name,
        );
      } else {
        const different = off.filter((d) => d > 0).length;
        t.ok(different <= (exact ? 0 : 0.002 * size) && off.every((d) => d <= 1), `${name}: ${different} differ`);
      }
    }
    await stream.close();
  }
}

/** Of parameters and state after some steps of every rule over tensors of many pieces. */
async function digest(): Promise<string> {
  const hash = createHash('sha256');
  const normal = normalNumbers(5);
  const size = 100_003;
  const numbers = Float32Array.from({ length: size }, normal);
  const stream = new Stream(testDevice);
  const add = async (x: Tensor) => hash.update(new Uint8Array((await x.readBits()).buffer));
  for (const op of ['adamw', 'adamw8bit', 'lion', 'lion8bit', 'ademamix', 'sgd'] as const) {
    const params = [Tensor.from(stream, numbers, [size])];
    const state = ruleOf(op).states.flatMap((name) =>
      op.endsWith('8bit')
        ? [[zeros(stream, [size], 'u8')], [zeros(stream, [Math.ceil(size / 256)], 'f32')]]
        : [[zeros(stream, [size], 'f32', name === 'v' ? 'optimizer' : 'activations')]],
    );
    const counted = counters(stream, 1);
    for (let step = 0; step < 3; step++) {
      const gradients = [
        Tensor.from(
          stream,
          numbers.map((x, i) => Math.sin(x * (step + 1) + i)),
          [size],
        ),
      ];
      const norm = gradNorm(stream, gradients);
      const numbersOf = { beta1: 0.9, beta2: 0.99, beta3: 0.999, eps: 1e-8, alpha: 5, horizon: 2, momentum: 0.9 };
      const options = { lr: 1e-2, weightDecay: 0.1, maxNorm: 1, ...numbersOf };
      const applied = optimizerStep(op, { params, gradients, norm, ...counted }, state, options);
      await add(finishStep(norm, [applied], counted, 0));
    }
    for (const x of [...params, ...state.flat()]) await add(x);
  }
  await stream.close();
  return hash.digest('hex');
}

if (process.env.OPTIMIZER_DIGEST) {
  process.stdout.write(await digest());
  process.exit();
}

if (!process.env.QLORA_CPU) {
  t.test('the same bits from every instruction set and any number of threads', async (t) => {
    const digests = native.cpu().instructionSets.flatMap((isa, i) =>
      (i === 0 ? [1, 2, 5] : [2]).map((threads) =>
        execFileSync(process.execPath, [fileURLToPath(import.meta.url)], {
          env: { ...process.env, OPTIMIZER_DIGEST: '1', QLORA_CPU: isa, QLORA_NUM_THREADS: String(threads) },
          encoding: 'utf8',
        }),
      ),
    );
    t.match(digests[0], /^[0-9a-f]{64}$/);
    t.same(new Set(digests).size, 1);
  });
}

await forEachIsa(t, import.meta.url, async () => {
  for (const rule of ['adamw', 'sgd', 'lion', 'ademamix'])
    t.ok(
      index.traces.some(({ optimizer }) => optimizer === rule),
      `the references have traces of ${rule}`,
    );
  for (const trace of index.traces) {
    await t.test(trace.name, async (t) => {
      await checkTrace(t, trace);
      if (Object.keys(trace.state ?? {}).length) await checkSteps(t, trace);
    });
  }

  for (const { name, maxNorm, tensors, totalNorm } of index.clipping) {
    // Gradients that a scaled loss has made larger are unscaled first.
    for (const scale of [1, 4096]) {
      await t.test(`clipping: ${name}, loss scaled by ${scale}`, async (t) => {
        const stream = new Stream(testDevice);
        const originals = Array.from({ length: tensors }, (_, i) => clipping(`${name}.grad.${i}`));
        const scaled = originals.map((original) => valuesOf(original).map((x) => x * scale));
        const gradients = originals.map(({ shape }, i) => Tensor.from(stream, scaled[i] as Float32Array, shape));
        const norm = gradNorm(stream, gradients);
        const counted = counters(stream, scale);
        // From zero and with a rate of -1, SGD's parameters become the gradients that it used.
        const params = originals.map(({ shape }) => zeros(stream, shape, 'f32'));
        const options = { lr: -1, momentum: 0, weightDecay: 0, maxNorm };
        const applied = optimizerStep('sgd', { params, gradients, norm, ...counted }, [], options);
        const [actual, finite, reported] = await finishStep(norm, [applied], counted, 0).read();
        t.ok(Math.abs((actual as number) - totalNorm) <= 2e-6 * totalNorm, `norm ${actual}, expected ${totalNorm}`);
        t.same([finite, reported], [1, scale]);
        for (const [i, original] of originals.entries()) {
          const used = await (params[i] as Tensor).read();
          const expected = valuesOf(clipping(`${name}.clipped.${i}`));
          const bad = expected.findIndex((e, j) => Math.abs((used[j] as number) - e) > 2e-6 * Math.abs(e));
          t.equal(bad, -1, 'clipped as PyTorch does');
          if (totalNorm < maxNorm) t.same([...used], [...valuesOf(original)], 'bit for bit');
          t.same([...(await (gradients[i] as Tensor).read())], [...(scaled[i] as Float32Array)], 'gradients stay');
        }
        await stream.close();
      });
    }
  }

  await t.test('a gradient that is not finite changes nothing', async (t) => {
    for (const spoilt of [Number.NaN, Number.POSITIVE_INFINITY]) {
      const stream = new Stream(testDevice);
      const lists = [1, 2, 3, 4].map((x) => [Tensor.from(stream, Float32Array.of(x, x), [2])]);
      const [params, m, v, m2] = lists as [Tensor[], Tensor[], Tensor[], Tensor[]];
      const gradients = [Tensor.from(stream, Float32Array.of(1, spoilt), [2])];
      const norm = gradNorm(stream, gradients);
      const counted = counters(stream, 1);
      const inputs = { params, gradients, norm, ...counted };
      const options = { lr: 0.1, weightDecay: 0.1, maxNorm: 1, beta1: 0.9, beta2: 0.999, eps: 1e-8, momentum: 0.9 };
      const applied = [
        optimizerStep('adamw', inputs, [m, v], options),
        optimizerStep('sgd', inputs, [m], options),
        optimizerStep('lion', inputs, [m], options),
        optimizerStep('ademamix', inputs, [m, m2, v], { ...options, beta3: 0.9, alpha: 5, horizon: 0 }),
      ];
      t.equal((await finishStep(norm, applied, counted, 0).read())[1], 0);
      t.same(await Promise.all(applied.map(async (a) => (await a.read())[0])), [0, 0, 0, 0]);
      for (const [i, list] of lists.entries()) t.same([...(await (list[0] as Tensor).read())], [i + 1, i + 1]);
      t.same([...(await counted.counters.read())], [0, 0], 'and does not count');
      await stream.close();
    }
  });

  await t.test("the loss scale, as PyTorch's GradScaler has it", async (t) => {
    const stream = new Stream(testDevice);
    const counted = counters(stream, 8);
    const [good, bad] = [1, 0].map((finite) => Tensor.from(stream, Float32Array.of(64, finite), [2])) as [
      Tensor,
      Tensor,
    ];
    const seen: number[][] = [];
    for (const norm of [bad, good, good, good, bad, bad, bad, good, good, bad]) {
      const [gradNorm, applied, used] = await finishStep(norm, [], counted, 3).read();
      t.equal(gradNorm, 64 / (used as number));
      seen.push([used as number, applied as number, ...(await counted.counters.read())]);
    }
    t.same(seen, [
      [8, 0, 0, 0],
      [4, 1, 1, 1],
      [4, 1, 2, 2],
      [4, 1, 3, 0],
      [8, 0, 3, 0],
      [4, 0, 3, 0],
      [2, 0, 3, 0],
      [1, 1, 4, 1],
      [1, 1, 5, 2],
      [1, 0, 5, 0],
    ]);
    t.equal((await counted.lossScale.read())[0], 1, 'no less than 1');
    await stream.close();
  });

  await t.test('the norm of gradients whose squares overflow fp32, and of none', async (t) => {
    const stream = new Stream(testDevice);
    const huge = gradNorm(stream, [Tensor.from(stream, new Float32Array(40000).fill(1e30), [200, 200])]);
    t.ok(Math.abs(((await huge.read())[0] as number) / 2e32 - 1) < 1e-6);
    t.same([...(await gradNorm(stream, []).read())], [0, 1]);
    await stream.close();
  });

  const list = (s: Stream, ...shape: number[]) => [zeros(s, shape, 'f32')];
  const call = (
    s: Stream,
    op: OptimizerOp,
    params: Tensor[],
    gradients: Tensor[],
    state: Tensor[][],
    options: Partial<StepOptions> = {},
  ) =>
    optimizerStep(op, { params, gradients, norm: zeros(s, [2], 'f32'), ...counters(s, 1) }, state, {
      ...{ lr: 0.1, weightDecay: 0, maxNorm: 0, momentum: 0, beta1: 0.9, beta2: 0.999, eps: 1e-8 },
      ...options,
    });
  await checkMisuse(t, [
    {
      name: 'gradients of another shape',
      run: (s) => call(s, 'sgd', list(s, 2), list(s, 3), []),
      code: 'ERR_QLORA_SHAPE',
      message: /sgd: grads must have shape \[2\], got \[3\]/,
    },
    {
      name: 'momentum without a place for it',
      run: (s) => call(s, 'sgd', list(s, 2), list(s, 2), [], { momentum: 0.9 }),
      code: 'ERR_QLORA_ARGUMENT',
      message: /sgd: m must list 1 tensors, as params does, got 0/,
    },
    {
      name: 'a number that is missing',
      run: (s) => call(s, 'lion', list(s, 2), list(s, 2), [list(s, 2)], { beta1: undefined }),
      code: 'ERR_QLORA_ARGUMENT',
      message: /lion: beta1 and beta2 must be in \[0, 1\)/,
    },
    {
      name: 'fp32 state for 8 bits',
      run: (s) => call(s, 'lion8bit', list(s, 2), list(s, 2), [list(s, 2), list(s, 1)]),
      code: 'ERR_QLORA_DTYPE',
      message: /lion8bit: m must be u8, got f32/,
    },
    {
      name: 'absmax of other blocks',
      run: (s) => call(s, 'lion8bit', list(s, 300), list(s, 300), [[zeros(s, [300], 'u8')], list(s, 1)]),
      code: 'ERR_QLORA_SHAPE',
      message: /lion8bit: m must have shape \[2\], got \[1\]/,
    },
    {
      name: '16-bit parameters',
      run: (s) => call(s, 'adamw', [zeros(s, [2], 'bf16')], list(s, 2), [list(s, 2), list(s, 2)]),
      code: 'ERR_QLORA_DTYPE',
      message: /adamw: params must be f32, got bf16/,
    },
  ]);
});
