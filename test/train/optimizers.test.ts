/** The Optimizer: every kind by its name, paging, saving, groups of parameters, the scale of f16's loss. */
import { spawnSync } from 'node:child_process';
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { constants } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import t, { type Test } from 'tap';
import { Stream, Tensor } from '../../lib/tensor.js';
import { Optimizer, type OptimizerSetting } from '../../lib/train/optimizer.js';
import { stateBytes } from '../../lib/train/optimizer-kinds.js';
import { optimizerNames, type TrainerOptions } from '../../lib/train/options.js';
import { cannotInject, injecting } from '../support/injector.js';
import { bitsOf, gradientsOf, optionsOf, parametersOf, shapes, takeSteps } from '../support/optimizer-runs.js';
import { exact, gradientOf, index, lastStep, reference, type Trace, worst } from '../support/optimizer-traces.js';
import { readSafetensors } from '../support/safetensors.js';

const plain: OptimizerSetting = { totalSteps: 100, computeDtype: 'f32' };
const smallSlots = 2 ** 20;

/** The names that run a trace. */
function namesOf({ optimizer, options }: Trace): TrainerOptions['optimizer'][] {
  if (optimizer === 'sgd') return ['sgd'];
  if (optimizer === 'ademamix') return options.horizon ? ['ademamix'] : [];
  const bits = options.bits === 8 ? '8bit' : '32bit';
  return optimizer === 'lion' ? [`lion_${bits}`] : [`adamw_${bits}`, `paged_adamw_${bits}`];
}

t.test('every optimizer by its name runs along its traces', async (t) => {
  const seen = new Set<string>();
  for (const trace of index.traces.filter(({ size }) => size > 1)) {
    const { options, size } = trace;
    for (const name of namesOf(trace)) {
      seen.add(name as string);
      const stream = new Stream();
      const param = Tensor.from(stream, reference(trace.start).slice(0, size), [size]);
      const [adamBeta1 = 0.9, adamBeta2 = 0.999, beta3 = 0.9999] = options.betas ?? [];
      const resolved = optionsOf({
        optimizer: name,
        weightDecay: options.weight_decay,
        momentum: options.momentum ?? 0,
        adamBeta1,
        adamBeta2,
        adamEpsilon: options.eps ?? 1e-8,
        ademamix: { beta3, alpha: options.alpha ?? 5 },
        maxGradNorm: 0,
      });
      const setting = { totalSteps: options.horizon ?? 100, computeDtype: 'f32' } as const;
      const directory = t.testdir({});
      const paging = name?.startsWith('paged') ? { residentBytes: 0, directory } : undefined;
      const optimizer = await Optimizer.create(new Map([['p', param]]), resolved, { ...setting, paging });
      for (let step = 1; step <= lastStep; step++) {
        await param.gradient?.write(gradientOf(trace, step));
        optimizer.step(options.lr).dispose();
      }
      const last = trace.steps.length - 1;
      const [actual, expected] = [await param.read(), reference(trace.param).slice(last * size, (last + 1) * size)];
      const eight = options.bits === 8 && size >= 4096;
      if (eight && !exact) {
        const most = actual.reduce((max, p, i) => Math.max(max, Math.abs(p - (expected[i] as number))), 0);
        t.ok(most <= 5e-4, `${trace.name}, ${name}: off by ${most}`);
      } else {
        const error = worst(actual, expected);
        t.ok(error <= (eight ? 0 : 1), `${trace.name}, ${name}: ${error.toFixed(3)} of what is allowed`);
      }
      await stream.close();
    }
  }
  t.same(seen, new Set(optimizerNames));
});

t.test('paged state gives the bits of state in memory, in less of it', async (t) => {
  for (const name of ['paged_adamw_32bit', 'paged_adamw_8bit'] as const) {
    const options = optionsOf({ optimizer: name, loraPlusRatio: 4 });
    const state = stateBytes(options, Object.values(shapes));
    const run = async (residentBytes: number | undefined) => {
      const directory = t.testdir({});
      const stream = new Stream();
      const parameters = parametersOf(stream);
      const paging = residentBytes === undefined ? undefined : { residentBytes, directory, slotBytes: smallSlots };
      const optimizer = await Optimizer.create(parameters, options, { ...plain, paging });
      t.same(readdirSync(directory), [], 'the file has no name');
      await takeSteps(optimizer, parameters, [1, 2, 3]);
      const { optimizer: bytes = 0 } = stream.memory().peakByClass;
      const path = join(t.testdir({}), 'state.safetensors');
      await optimizer.save(path);
      const result = { bits: await bitsOf(parameters), saved: readFileSync(path), bytes };
      optimizer.dispose();
      await stream.close();
      return result;
    };
    const whole = await run(undefined);
    t.ok(state > (name.endsWith('32bit') ? 10 : 2) * smallSlots, `${state} bytes of state are many slots`);
    for (const resident of [0, state / 2, state]) {
      const paged = await run(resident);
      t.equal(paged.bits, whole.bits, `${name}: parameters, ${resident} bytes in memory`);
      t.ok(paged.saved.equals(whole.saved), `${name}: state, ${resident} bytes in memory`);
      const slots = resident === state ? 0 : 3 * smallSlots;
      const expected = whole.bytes - state + slots + resident;
      t.ok(paged.bytes <= expected + 1024, `${paged.bytes} bytes of memory, at most ${expected}`);
    }
  }
});

t.test('saved and loaded, a run goes on bit for bit', async (t) => {
  const kinds = optimizerNames.map((optimizer) => ({ optimizer, computeDtype: 'f32' as const, momentum: 0.9 }));
  for (const { computeDtype, ...kind } of [...kinds, { ...kinds[0], computeDtype: 'f16' as const, momentum: 0 }]) {
    const options = optionsOf(kind);
    const directory = t.testdir({});
    const path = join(directory, 'optimizer.safetensors');
    const pages = kind.optimizer?.startsWith('paged');
    const paging = pages ? { residentBytes: 0, directory, slotBytes: smallSlots } : undefined;
    const setting = { totalSteps: 8, computeDtype };
    const stream = new Stream();
    const parameters = parametersOf(stream);
    const optimizer = await Optimizer.create(parameters, options, setting);
    await takeSteps(optimizer, parameters, [1, Number.NaN, 2]);
    await optimizer.save(path);
    const kept = await Promise.all([...parameters].map(async ([name, p]) => [name, await p.read()] as const));
    await takeSteps(optimizer, parameters, [3, 4]);
    const undisturbed = await bitsOf(parameters);
    const again = new Map(
      kept.map(([name, data]) => [name, Tensor.from(stream, data, parameters.get(name)?.shape ?? [])]),
    );
    // What was saved unpaged goes on paged, where the kind pages.
    const other = await Optimizer.create(again, options, { ...setting, paging });
    await other.load(path);
    const copy = join(directory, 'copy.safetensors');
    await other.save(copy);
    t.ok(readFileSync(copy).equals(readFileSync(path)), `${kind.optimizer}: the same file`);
    const results = await takeSteps(other, again, [3, 4]);
    t.equal(await bitsOf(again), undisturbed, `${kind.optimizer}, ${computeDtype}`);
    t.equal(results[0]?.[2], computeDtype === 'f16' ? 2 ** 15 : 1, 'the scale that the skipped step halved');
    const { data } = readSafetensors(path).get('counters') ?? {};
    t.same([...(data as Int32Array)], [2, 1], 'steps that were applied');
    await stream.close();
  }
});

t.test("another optimizer's state is refused", async (t) => {
  const stream = new Stream();
  const parameters = parametersOf(stream);
  const directory = t.testdir({});
  const path = join(directory, 'state.safetensors');
  const make = (options: Partial<TrainerOptions>, some = parameters, setting = plain) =>
    Optimizer.create(some, optionsOf(options), setting);
  const saved = await make({ optimizer: 'adamw_32bit' });
  await saved.save(path);
  const refuses = (optimizer: Optimizer, from: string, message: RegExp) =>
    t.rejects(optimizer.load(from), { name: 'QLoRAError', code: 'ERR_QLORA_OPTIMIZER_STATE', message, hint: String });
  await refuses(
    await make({ optimizer: 'adamw_8bit' }),
    path,
    /holds the state of adamw in 32 bits, expected that of adamw in 8/,
  );
  await refuses(await make({ optimizer: 'lion_32bit' }), path, /expected that of lion in 32 bits/);
  const fewer = new Map([...parameters].slice(1));
  await refuses(await make({}, fewer), path, /'wide\.lora_A\.weight\.m' belongs to nothing that is trained here/);
  const other = new Map(parameters).set('small', Tensor.from(stream, new Float32Array(8), [2, 4]));
  await refuses(await make({}, other), path, /'small\.m' must be f32 \[2, 4\], got f32 \[7\]/);
  const more = new Map(parameters).set('more', Tensor.from(stream, new Float32Array(8), [8]));
  await refuses(await make({}, more), path, /'more\.m', f32 \[8\], is missing/);
  await refuses(
    await make({}, parameters, { ...plain, computeDtype: 'f16' }),
    path,
    /'loss_scale', f32 \[1\], is missing/,
  );
  const bytes = readFileSync(path);
  const header = JSON.parse(bytes.toString('utf8', 8, 8 + Number(bytes.readBigUInt64LE(0))));
  bytes.writeInt32LE(-1, 8 + Number(bytes.readBigUInt64LE(0)) + header.counters.data_offsets[0]);
  const damaged = join(directory, 'damaged.safetensors');
  writeFileSync(damaged, bytes);
  await refuses(saved, damaged, /'counters' must count steps, got -1 and 0/);
  await t.rejects(saved.load(join(directory, 'none')), { code: 'ERR_QLORA_FILE_NOT_FOUND' });
  const unpaged = make({ optimizer: 'lion_8bit' }, parameters, { ...plain, paging: { residentBytes: 0, directory } });
  await t.rejects(unpaged, { code: 'ERR_QLORA_INTERNAL', message: /'lion_8bit' is not paged/ });
  await stream.close();
});

t.test('a skipped step does not count: bias correction goes on where it was', async (t) => {
  const run = async (steps: number[]) => {
    const stream = new Stream();
    const parameters = parametersOf(stream);
    const optimizer = await Optimizer.create(parameters, optionsOf({ optimizer: 'adamw_32bit' }), plain);
    await takeSteps(optimizer, parameters, steps);
    const bits = await bitsOf(parameters);
    await stream.close();
    return bits;
  };
  t.equal(await run([1, Number.NaN, 2, Number.NaN, Number.NaN, 3]), await run([1, 2, 3]));
});

t.test('LoRA+: B learns at its own rate, the norm is of all', async (t) => {
  const learningRate = 0.01;
  const moved: Float32Array[][] = [];
  for (const loraPlusRatio of [1, 16]) {
    const stream = new Stream();
    const parameters = parametersOf(stream);
    const before = await Promise.all([...parameters.values()].map((p) => p.read()));
    const options = optionsOf({ optimizer: 'sgd', loraPlusRatio, maxGradNorm: 0.5 });
    const optimizer = await Optimizer.create(parameters, options, plain);
    const [result] = await takeSteps(optimizer, parameters, [1], learningRate);
    const after = await Promise.all([...parameters.values()].map((p) => p.read()));
    const gradients = [...gradientsOf(parameters, 1).values()];
    const norm = Math.sqrt(gradients.reduce((sum, g) => sum + g.reduce((s, x) => s + x * x, 0), 0));
    t.ok(Math.abs((result?.[0] ?? 0) / norm - 1) < 1e-6, 'the norm of all gradients');
    const clip = 0.5 / norm;
    [...parameters.keys()].forEach((name, i) => {
      const rate = learningRate * clip * (name.endsWith('.lora_B.weight') ? loraPlusRatio : 1);
      const bad = gradients[i]?.findIndex((g, k) => {
        const start = before[i]?.[k] as number;
        return Math.abs((after[i]?.[k] as number) - (start - rate * g)) > 1e-6 * (1 + Math.abs(start));
      });
      t.equal(bad, -1, `${name} at ratio ${loraPlusRatio}`);
    });
    moved.push(after);
    await stream.close();
  }
  t.notSame(moved[0]?.[1]?.slice(0, 4), moved[1]?.[1]?.slice(0, 4), 'B moved otherwise');
});

t.test('a disk that fails under paged state', { skip: cannotInject }, async (t: Test) => {
  const folder = t.testdir({ pages: {} });
  const pages = join(folder, 'pages');
  const injected = { ...process.env, ...injecting('fail_io', folder), FAIL_UNDER: pages };
  const child = fileURLToPath(new URL('../support/paging-child.js', import.meta.url));
  const run = (call: string, at: number, how: string | number) => {
    const env = { ...injected, FAIL_CALL: call, FAIL_AT: String(at), FAIL_WITH: String(how) };
    const result = spawnSync(process.execPath, [child, pages], { encoding: 'utf8', env });
    t.equal(result.status, 0, `${call} ${at} ${how}: ${result.stderr}`);
    t.equal(result.signal, null, 'no signal');
    return JSON.parse(result.stdout) as {
      error?: { name: string; code: string; hint: string };
      later?: string[];
      bits?: string;
    };
  };
  const { ENOSPC, EIO, EINTR } = constants.errno;
  const { bits } = run('none', 0, EIO);
  t.match(bits, /^[0-9a-f]{64}$/);
  t.match(run('reserve', 0, ENOSPC), {
    error: { name: 'QLoRAError', code: 'ERR_QLORA_DISK_FULL', hint: /space/ },
  });
  t.match(run('reserve', 0, EIO), { error: { code: 'ERR_QLORA_WRITE_FAILED', hint: String } });
  t.equal(run('reserve', 0, EINTR).bits, bits);
  for (const [call, at] of [
    ['read', 1],
    ['read', 30],
    ['write', 0],
    ['write', 25],
  ] as const) {
    t.equal(run(call, at, 'short').bits, bits, `a short ${call} is continued`);
    t.equal(run(call, at, EINTR).bits, bits, `an interrupted ${call} is repeated`);
  }
  for (const [call, at, how, code] of [
    ['read', 30, EIO, 'ERR_QLORA_READ_FAILED'],
    ['read', 30, 'end', 'ERR_QLORA_READ_FAILED'],
    ['write', 0, ENOSPC, 'ERR_QLORA_DISK_FULL'],
    ['write', 25, EIO, 'ERR_QLORA_WRITE_FAILED'],
  ] as const) {
    const { error, later } = run(call, at, how);
    t.match(error, { name: 'QLoRAError', code, hint: /resume from the last checkpoint/ }, `${call} ${at} ${how}`);
    t.same(new Set(later), new Set([code]), 'half a step is neither gone on from nor saved');
  }
  t.same(run('read', 0, EIO).later, ['fine', 'fine', 'fine'], 'before anything changed, nothing is lost');
  t.same(readdirSync(pages), [], 'nothing is left');
});
