/** What the engine promises whatever runs on it: a free event loop, no crash, no leak, the same bits. */
import { createHash } from 'node:crypto';
import { join } from 'node:path';
import { setImmediate as turn } from 'node:timers/promises';
import { Worker } from 'node:worker_threads';
import t, { type Test } from 'tap';
import { Tape } from '../lib/autograd.js';
import { QLoRATrainer, QuantizedModel } from '../lib/index.js';
import { matmul } from '../lib/ops/matmul.js';
import { Weight } from '../lib/ops/weight.js';
import { Stream, Tensor } from '../lib/tensor.js';
import { type ChildResult, runChild } from './support/child.js';
import { trainingBits } from './support/engine-child.js';
import { cannotInject, injecting } from './support/injector.js';
import { packageRoot, referencesDir } from './support/references.js';

const tiny = join(referencesDir('models'), 'llama');
const demo = join(packageRoot(), 'examples', 'demo', 'model');
const ids = Array.from({ length: 20 }, (_, i) => (i * 37) % 200);

/** What the child printed; a signal, a wrong exit status or words on stderr fail the test. */
function outcome(t: Test, result: ChildResult, status = 0): unknown {
  t.equal(result.signal, null, 'not killed, no crash');
  t.equal(result.status, status, result.stderr);
  return result.stdout === '' ? undefined : JSON.parse(result.stdout);
}

t.test('operations are enqueued, and only a read waits', async (t) => {
  const stream = new Stream();
  const x = Tensor.from(stream, new Float32Array(1_000_000).fill(1), [1_000_000]);
  const outputs = Array.from({ length: 50 }, () => {
    const y = new Tensor(stream, 'f32', [1_000_000]);
    stream.run('add', x, x, y);
    return y;
  });
  const all = outputs.length * 4_000_000;
  t.ok(stream.memory().liveBytes < all, 'the calls returned before the operations ran');
  t.equal((await (outputs.at(-1) as Tensor).read())[999_999], 2);
  t.ok(stream.memory().liveBytes >= all, 'after the read they have');
  for (const y of [x, ...outputs]) y.dispose();
  await stream.sync();
  t.equal(stream.memory().liveBytes, 0);
  await stream.close();
});

t.test('timers and promises run while a model trains', async (t) => {
  const rows = Array.from({ length: 4 }, (_, i) => ({
    inputIds: Array.from({ length: 64 }, (_, k) => (i + 3 * k) % 500),
  }));
  await using trainer = await QLoRATrainer.create({
    model: demo,
    dataset: rows,
    outputDir: t.testdir(),
    gradientAccumulationSteps: 4,
  });
  let turns = 0;
  let timers = 0;
  let training = true;
  const counting = (async () => {
    for (; training; turns++) await turn();
  })();
  const timer = setInterval(() => timers++, 1);
  await trainer.trainStep(rows);
  const [turnsOfStep, timersOfStep] = [turns, timers];
  training = false;
  clearInterval(timer);
  await counting;
  // 4 micro-steps: a loop that is held by each of them would come round some five times.
  t.ok(turnsOfStep > 40, `${turnsOfStep} turns of the event loop in one step`);
  t.ok(timersOfStep > 4, `${timersOfStep} timers in one step`);
});

t.test('a worker thread computes the same bits', async (t) => {
  const expected = await trainingBits();
  const worker = new Worker(new URL('./support/engine-child.js', import.meta.url), { workerData: ['bits'] });
  t.same(await new Promise((resolve) => worker.once('message', resolve)), expected);
  await worker.terminate();
  const results = await Promise.all(
    [1, 2, 3].map((n) => runChild('bits', [], { env: { QLORA_NUM_THREADS: String(n) } })),
  );
  for (const [i, result] of results.entries()) t.same(outcome(t, result), expected, `${i + 1} threads`);
});

t.test('terminate() and exit() in mid-work', async (t) => {
  for (const ms of [5, 40, 150]) {
    t.ok(outcome(t, await runChild('terminate', [ms])), `terminated ${ms} ms after a step began: the others go on`);
    outcome(t, await runChild('exit', [200 + ms, 7]), 7);
  }
  for (const ms of [0, 4, 12]) {
    t.equal(outcome(t, await runChild('terminateLoading', [ms])), 'terminated');
    outcome(t, await runChild('exitLoading', [ms]));
  }
  t.same(outcome(t, await runChild('pendingRead', ['endsWithReads'])), { code: 0, live: 0 });
  t.same(outcome(t, await runChild('pendingRead', ['exitsWithReads'])), { code: 3, live: 0 });
});

t.test('an idle process ends, and a dropped read keeps none alive', async (t) => {
  t.equal(outcome(t, await runChild('idle')), '42');
  t.same(outcome(t, await runChild('closed')), Array(3).fill('ERR_QLORA_DISPOSED'));
});

// AddressSanitizer sees the end of a tensor only where each is allocated by itself.
const noSegments =
  process.env.ASAN_OPTIONS !== undefined && 'under AddressSanitizer memory is not kept for the next step';
t.test('a training step maps no page', { skip: noSegments }, async (t) => {
  // One thread, so that the stream's own is all that computes.
  const { first, later } = outcome(t, await runChild('stepFaults', [], { env: { QLORA_NUM_THREADS: '1' } })) as {
    first: number;
    later: number[];
  };
  // Pages may be of 4 KiB or of 2 MiB.
  t.ok(first > 10, `${first} in the first step`);
  t.ok(later.filter((n) => n > 0).length <= 1, `after the second: ${later}`);
});

t.test('nothing grows', async (t) => {
  // AddressSanitizer, where it runs, holds freed memory back, to see who uses it: not 256 MB of it here.
  const env = { ASAN_OPTIONS: `${process.env.ASAN_OPTIONS ?? ''}:quarantine_size_mb=1` };
  const gc = { node: ['--expose-gc'], env };
  const MiB = 2 ** 20;
  const grown = async (mode: string, ...args: (string | number)[]) => {
    return outcome(t, await runChild(mode, args, gc)) as {
      grown: number;
      peak: number;
      live: number;
      most: number;
      after: object;
      before: object;
    };
  };
  const dropped = await grown('collected');
  t.ok(dropped.peak > 0);
  t.equal(dropped.live, 0, 'tensors that nobody disposed of are collected');
  // 10,000 tensors of 12 KB: a leak of every tenth would be 12 MB.
  const tensors = await grown('tensorCycles', 10_000);
  t.ok(tensors.grown < 12 * MiB, `create and dispose of tensors: ${tensors.grown} bytes`);
  t.equal(tensors.live, 0);
  t.ok((await grown('tensorCycles', 10_000, 'leak')).grown > 12 * MiB, 'a leak would be seen');
  // A model takes 86 KB and its stream more: 400 models that stay are above 34 MB. V8 and malloc settle meanwhile.
  const models = await grown('modelCycles', 600);
  t.ok(models.grown < 20 * MiB, `load and dispose of models: ${models.grown} bytes`);
  t.equal(models.most, 0, 'every byte that was counted is given back');
  const adapters = await grown('adapterCycles', 400);
  // An adapter takes 57 KB: 260 that stay are above 14 MB.
  t.ok(adapters.grown < 12 * MiB, `add and remove adapters: ${adapters.grown} bytes`);
  t.same(adapters.after, adapters.before);
});

t.test('an allocation that fails, wherever in forward and backward', async (t) => {
  const run = async (stream: Stream, limit: number) => {
    const x = Tensor.from(stream, new Float32Array(6).fill(1), [2, 3]);
    const w = Tensor.from(stream, new Float32Array(12).fill(0.5), [4, 3], 'weights');
    x.requiresGrad = true;
    w.requiresGrad = true;
    w.gradient = Tensor.from(stream, new Float32Array(12), [4, 3], 'optimizer');
    await stream.sync();
    stream.setMemoryLimit(limit && stream.memory().liveBytes + limit);
    const tape = new Tape();
    const y = matmul(tape, x, Weight.dense(w));
    const z = matmul(tape, y, Weight.dense(w).N === 4 ? Weight.dense(w.view([3, 4])) : Weight.dense(w));
    const dz = Tensor.from(stream, new Float32Array(6).fill(1), [2, 3]);
    const dx = tape.backward(z, dz, x) as Tensor;
    const results = await Promise.allSettled([z.read(), dx.read(), w.gradient.read(), w.read()]);
    stream.setMemoryLimit(0);
    for (const tensor of [x, w, y, z, dz, dx]) tensor.dispose();
    await stream.sync();
    return results;
  };
  const stream = new Stream();
  const whole = await run(stream, 0);
  t.ok(whole.every((r) => r.status === 'fulfilled'));
  let failures = 0;
  for (let limit = 4; ; limit += Math.max(4, limit >> 4)) {
    const results = await run(stream, limit);
    t.equal(results[3]?.status, 'fulfilled', 'the parameter is as it was');
    const failed = results.filter((r) => r.status === 'rejected');
    for (const { reason } of failed)
      t.match(reason, {
        name: 'QLoRAError',
        code: 'ERR_QLORA_OUT_OF_MEMORY',
        message: /\d+ bytes of \w+ were wanted.*limit is \d+/,
        hint: String,
      });
    for (const [i, r] of results.entries()) if (r.status === 'fulfilled' && i !== 2) t.same(r, whole[i]);
    const { byClass } = stream.memory();
    t.equal(byClass.activations, 0, `limit ${limit}: nothing is left`);
    if (failed.length === 0) break;
    failures++;
  }
  t.ok(failures > 10, `${failures} limits were too low`);
  await stream.close();
});

t.test('a step that runs out of memory changes nothing, and training goes on', async (t) => {
  const rows = Array.from({ length: 4 }, (_, i) => ({ inputIds: ids.map((id) => (id + i) % 200) }));
  const make = () =>
    QLoRATrainer.create({
      model: tiny,
      dataset: rows,
      outputDir: t.testdir(),
      batchSize: 2,
      gradientAccumulationSteps: 2,
      learningRate: 1e-2,
      lora: { r: 4 },
      maxSteps: 3,
    });
  const unhandled: unknown[] = [];
  const listener = (reason: unknown) => unhandled.push(reason);
  process.on('unhandledRejection', listener);
  await using calm = await make();
  const expected = [await calm.trainStep(rows), await calm.trainStep(rows)];
  const peak = calm.model.memory().peakBytes;
  await using tried = await make();
  t.same(await tried.trainStep(rows), expected[0]);
  const { stream } = tried.model.core;
  const state = async () => {
    const layers = tried.adapter?.layers ?? [];
    const all = await Promise.all([tried.model.logits(ids), ...layers.flatMap((l) => [l.read('A'), l.read('B')])]);
    return all.map((values) => createHash('sha256').update(new Uint8Array(values.buffer)).digest('hex'));
  };
  const before = await state();
  const { liveBytes, byClass } = tried.model.memory();
  const limits = 40;
  for (let i = 0; i < limits; i++) {
    stream.setMemoryLimit(liveBytes + Math.floor(((peak - liveBytes) * i) / limits) + 1);
    const work = async () => (i % 2 ? tried.trainStep(rows) : tried.train());
    await t.rejects(work, { name: 'QLoRAError', code: 'ERR_QLORA_OUT_OF_MEMORY' });
    stream.setMemoryLimit(0);
    t.same(await state(), before, `limit ${i}: logits and parameters are as they were`);
    await stream.sync();
    t.same(tried.model.memory().byClass, byClass, 'and so is the memory');
  }
  t.same(await tried.trainStep(rows), expected[1], 'the next step is the one that would have come');
  await turn();
  t.same(unhandled, [], 'no rejection is left unhandled');
  process.removeListener('unhandledRejection', listener);
});

t.test('errors of the addon are QLoRAErrors', async (t) => {
  const stream = new Stream();
  const x = Tensor.from(stream, new Float32Array(6), [2, 3]);
  const y = new Tensor(stream, 'f32', [3, 2]);
  const thrown = (code: string, message: RegExp) => ({ name: 'QLoRAError', code, message });
  t.throws(() => stream.run('add', x, x, y), thrown('ERR_QLORA_SHAPE', /\[2, 3\], got \[3, 2\]/));
  t.throws(() => stream.run('add', x, x), thrown('ERR_QLORA_ARGUMENT', /too few/));
  t.throws(() => stream.run('noSuchOp'), thrown('ERR_QLORA_INTERNAL', /noSuchOp/));
  t.throws(() => new Tensor(stream, 'f32', [-1]), thrown('ERR_QLORA_SHAPE', /non-negative/));
  t.throws(() => new Tensor(stream, 'f99' as 'f32', [1]), thrown('ERR_QLORA_ARGUMENT', /f99/));
  t.throws(() => x.view([7]), thrown('ERR_QLORA_SHAPE', /\[7\].*\[2, 3\]/));
  await t.rejects(y.read(), thrown('ERR_QLORA_INTERNAL', /nothing has written/));
  t.throws(() => x.write(new Float32Array(5)).catch(() => {}), thrown('ERR_QLORA_SHAPE', /holds 24 bytes, got 20/));
  const huge = new Tensor(stream, 'f32', [2 ** 20, 2 ** 20]);
  await t.rejects(huge.read(), thrown('ERR_QLORA_OUT_OF_MEMORY', /4398046511104 bytes/));
  stream.run('fill', huge, 1);
  const sum = new Tensor(stream, 'f32', [2]);
  stream.run('gradNorm', [huge], sum);
  await t.rejects(sum.read(), thrown('ERR_QLORA_OUT_OF_MEMORY', /4398046511104 bytes of activations/));
  const other = new Stream();
  const z = Tensor.from(other, new Float32Array(6), [2, 3]);
  t.throws(() => stream.run('add', x, z, z), thrown('ERR_QLORA_ARGUMENT', /another model's stream/));
  x.dispose();
  await t.rejects(x.read(), thrown('ERR_QLORA_DISPOSED', /disposed/));
  await other.close();
  await stream.close();
  t.throws(() => stream.run('fill', y, 1), thrown('ERR_QLORA_DISPOSED', /disposed/));
});

t.test('a handle of the addon is used again, but never while somebody may read by it', async (t) => {
  const stream = new Stream();
  const make = (value: number) => Tensor.from(stream, new Float32Array(4).fill(value), [2, 2]);
  const disposed = { name: 'QLoRAError', code: 'ERR_QLORA_DISPOSED' };
  const x = make(1);
  const view = x.view([4]);
  const { handle } = x;
  x.dispose();
  const y = make(2);
  t.equal(y.handle, handle, 'the next tensor has it');
  x.dispose();
  x.release();
  t.not(make(3).handle, handle, 'and keeps it, however often the first is disposed of');
  t.throws(() => stream.run('scale', x, y, 1), disposed);
  t.throws(() => stream.run('gradNorm', [x], y), disposed);
  t.throws(() => x.view([4]), disposed);
  await t.rejects(x.read(), disposed);
  t.same([...(await y.read())], [2, 2, 2, 2]);
  t.same([...(await view.read())], [1, 1, 1, 1], 'a view has a handle of its own');
  y.hold();
  y.dispose();
  t.not(make(4).handle, handle, 'one that is held is in use');
  t.same([...(await y.read())], [2, 2, 2, 2]);
  y.release();
  t.equal(view.view([2, 2]).handle, handle, 'a view may have it as well');
  t.throws(() => stream.run('add', 1 as never, view, view), {
    code: 'ERR_QLORA_ARGUMENT',
    message: /expected a tensor/,
  });
  await stream.close();
});

t.test('V8 collects no garbage for the memory of activations, which come and go within a step', async (t) => {
  const collections = outcome(t, await runChild('collections', [], { node: ['--expose-gc'] })) as Record<
    string,
    number
  >;
  t.equal(collections.activations, 0);
  t.equal(collections.scratch, 0);
  t.ok((collections.weights as number) > 0, 'but for that of weights, whose owner may be gone');
});

t.test('a class of memory has one name on both sides', async (t) => {
  for (const memoryClass of ['weights', 'adapters', 'optimizer', 'activations', 'scratch'] as const) {
    const stream = new Stream();
    const tensor = new Tensor(stream, 'u8', [4096], memoryClass);
    await tensor.write(new Uint8Array(4096));
    const { byClass } = stream.memory();
    t.ok((byClass[memoryClass] as number) >= 4096, memoryClass);
    for (const [name, size] of Object.entries(byClass)) if (name !== memoryClass) t.ok(size < 4096, `no ${name}`);
    tensor.dispose();
    await stream.close();
  }
});

t.test('a disposed model says so, and disposing of it twice is nothing', async (t) => {
  const model = await QuantizedModel.load(tiny);
  const early = model.logits(ids);
  await model.dispose();
  await model.dispose();
  t.equal((await early).length, ids.length * model.core.config.vocabSize, 'what was asked for before is finished');
  await t.rejects(model.logits(ids), { code: 'ERR_QLORA_DISPOSED' });
  await t.rejects(model.generateTokens(ids), { code: 'ERR_QLORA_DISPOSED' });
  t.equal(model.memory().liveBytes, 0);
});

t.test('threads that the system does not start', { skip: cannotInject }, async (t) => {
  const env = { ...injecting('fail_threads', t.testdir()), QLORA_NUM_THREADS: '8' };
  t.equal(outcome(t, await runChild('threads', [], { env })), true, 'those that were started compute');
});
