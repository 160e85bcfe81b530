/** Checkpoints, resuming, the best step, early stopping, and steps that are not finite, on tiny models. */
import { createHash } from 'node:crypto';
import { cpSync, readdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import t, { type Test } from 'tap';
import { QLoRATrainer, QuantizedModel, setLogger, type TrainEvent, type TrainerOptions } from '../../lib/index.js';
import { Stream, Tensor } from '../../lib/tensor.js';
import { Optimizer } from '../../lib/train/optimizer.js';
import { resolveTrainerOptions } from '../../lib/train/options.js';
import { referencesDir } from '../support/references.js';
import { rowOf, tinyRun } from '../support/tiny-run.js';

const plainRun = { evalDataset: undefined, evalSteps: undefined, keepBest: false } as const;
const outOf = (t: Test, name = 'out') => join(t.testdirName, name);

async function eventsOf(run: AsyncIterable<TrainEvent>): Promise<TrainEvent[]> {
  const events: TrainEvent[] = [];
  for await (const event of run) events.push(event);
  return events;
}
const evalsOf = (events: readonly TrainEvent[]) => events.filter((e) => e.type === 'eval');
const checkpointsIn = (out: string) => readdirSync(out).filter((name) => name.startsWith('checkpoint-'));
const bytesOf = (...path: string[]) =>
  createHash('sha256')
    .update(readFileSync(join(...path)))
    .digest('hex');

/** Trains to step `at` and leaves there. */
async function leaveAt(options: TrainerOptions, at: number): Promise<string> {
  await using trainer = await QLoRATrainer.create(options);
  const run = trainer.train();
  for await (const e of run) if (e.type === 'step' && e.step === at) break;
  return (await run).outputDir;
}

async function resume(options: TrainerOptions, which: boolean | string = true) {
  await using trainer = await QLoRATrainer.create(options);
  const run = trainer.train({ resume: which });
  const events = await eventsOf(run);
  return { events, result: await run };
}

t.test('the best step is what a run ends with', async (t) => {
  t.testdir({});
  const out = outOf(t);
  await using trainer = await QLoRATrainer.create(tinyRun(out, { saveTotalLimit: 3, groupByLength: false }));
  const run = trainer.train();
  const kept: number[] = [];
  const events: TrainEvent[] = [];
  for await (const e of run) {
    events.push(e);
    if (e.type === 'step') kept.push(checkpointsIn(out).length);
  }
  const evals = evalsOf(events);
  t.same(
    evals.map((e) => e.step),
    [4, 8, 12, 16, 20, 24, 28, 32, 36, 40],
  );
  const best = evals.reduce((a, b) => (b.loss < a.loss ? b : a));
  t.ok(best.step < 36, `the best is an old one, ${best.step}`);
  t.ok(Math.max(...kept) <= 5, 'three, the best, and the one that goes'); // and it is removed soon after
  t.same(checkpointsIn(out).sort(), [best.step, 36, 38, 40].map((step) => `checkpoint-${step}`).sort());
  t.equal(
    bytesOf(out, 'adapter_model.safetensors'),
    bytesOf(out, `checkpoint-${best.step}`, 'adapter_model.safetensors'),
  );
  t.equal((await trainer.evaluate()).loss, best.loss, 'the model holds it too');
  t.match(await run, { steps: 40, stopped: false });
  await using model = await QuantizedModel.load(join(referencesDir('models'), 'llama-train'));
  const loaded = await model.loadLora('a', join(out, 'checkpoint-40'));
  t.equal(loaded.layers.length, 4, 'a checkpoint is an adapter');
});

t.test('early stopping', async (t) => {
  t.testdir({});
  const stopsEarly = { keepBest: false, earlyStoppingPatience: 2, learningRate: 0.05, maxSteps: 200, saveSteps: 250 };
  await using trainer = await QLoRATrainer.create(tinyRun(outOf(t), stopsEarly));
  const run = trainer.train();
  const evals = evalsOf(await eventsOf(run));
  const { steps, stopped } = await run;
  const best = evals.reduce((a, b) => (b.loss < a.loss ? b : a));
  t.equal(steps, best.step + 8, 'two evaluations, four steps each, without a lower loss');
  t.equal(stopped, false, 'it is a finished run');
  for (const [options, name] of [
    [{ keepBest: true }, 'keepBest'],
    [{ keepBest: true, evalSteps: 3 }, 'keepBest'],
    [{ evalSteps: 3 }, 'evalSteps needs evalDataset'],
    [{ earlyStoppingPatience: 2, evalDataset: 0.5 }, 'earlyStoppingPatience'],
  ] as const) {
    await t.rejects(QLoRATrainer.create(tinyRun(outOf(t), { ...plainRun, ...options })), {
      code: 'ERR_QLORA_OPTION_CONFLICT',
      message: new RegExp(name),
      hint: String,
    });
  }
});

t.test('keepBest that comes with a resume cannot keep what is gone', async (t) => {
  t.testdir({});
  // The loss rises from the first evaluation on, of whose step there is no checkpoint.
  const options = tinyRun(outOf(t), { keepBest: false, evalSteps: 3, learningRate: 0.3, maxSteps: 12, saveSteps: 8 });
  await leaveAt({ ...options }, 8);
  const { events, result } = await resume({ ...options, keepBest: true });
  const warning = events.find((e) => e.type === 'warning');
  t.match(warning, { code: 'BEST_NOT_KEPT', message: /checkpoint-[36]/ });
  const best = evalsOf(events).reduce((a, b) => (b.loss < a.loss ? b : a));
  t.match(result, { steps: 12, stopped: false });
  const kept = join(outOf(t), `checkpoint-${best.step}`);
  t.equal(bytesOf(result.outputDir, 'adapter_model.safetensors'), bytesOf(kept, 'adapter_model.safetensors'));
});

t.test('a best checkpoint that is damaged at the end is told of, and the last step is what stays', async (t) => {
  t.testdir({});
  await using trainer = await QLoRATrainer.create(tinyRun(outOf(t), { groupByLength: false, saveTotalLimit: 40 }));
  const run = trainer.train();
  const events: TrainEvent[] = [];
  for await (const event of run) {
    events.push(event);
    // The best is one of these.
    if (event.type === 'checkpoint' && event.step < 36) writeFileSync(join(event.path, 'optimizer.safetensors'), 'x');
  }
  t.match(await run, { steps: 40, stopped: false });
  const best = evalsOf(events).reduce((a, b) => (b.loss < a.loss ? b : a));
  const message = new RegExp(`^the run ends with its last step: .*checkpoint-${best.step} `);
  const warnings = events.filter((e) => e.type === 'warning');
  t.match(warnings, [{ code: 'BEST_NOT_KEPT', message }]);
  const last = join(outOf(t), 'checkpoint-40');
  t.equal(bytesOf(outOf(t), 'adapter_model.safetensors'), bytesOf(last, 'adapter_model.safetensors'));
});

t.test('what was stopped goes on as if it had not been', async (t) => {
  t.testdir({});
  const dataset = Array.from({ length: 16 }, (_, i) => rowOf(i, 5 + (i % 3)));
  const full = { ...plainRun, lora: 'none', quantization: 'none', computeDtype: 'f32', learningRate: 1e-3 } as const;
  for (const [name, options, file] of [
    ['adapter', { maxSteps: 12 }, 'adapter_model.safetensors'],
    // Stopped between two micro-steps of eight.
    ['long steps', { ...plainRun, maxSteps: 8, gradientAccumulationSteps: 8, dataset }, 'adapter_model.safetensors'],
    ['sgd', { ...plainRun, maxSteps: 12, optimizer: 'sgd', momentum: 0.9 }, 'adapter_model.safetensors'],
    ['dora', { ...plainRun, maxSteps: 8, lora: { r: 2, useDora: true, dropout: 0.1 } }, 'adapter_model.safetensors'],
    ['all weights', { ...full, maxSteps: 8 }, 'model.safetensors'],
  ] as [string, Partial<TrainerOptions>, string][]) {
    const [calm, left] = [outOf(t, `${name} calm`), outOf(t, `${name} left`)];
    const undisturbed = await resume(tinyRun(calm, { saveSteps: 4, ...options }));
    const path = await leaveAt(tinyRun(left, { saveSteps: 100, ...options }), 3);
    t.match(path, /checkpoint-[345]$/);
    const { events, result } = await resume(tinyRun(left, { saveSteps: 4, ...options }));
    t.equal(result.stopped, false);
    t.equal(bytesOf(left, file), bytesOf(calm, file), `${name}: bit for bit`);
    const optimizer = `checkpoint-${options.maxSteps}/optimizer.safetensors`;
    t.equal(bytesOf(left, optimizer), bytesOf(calm, optimizer), `${name}: the optimizer's state`);
    const log = (all: TrainEvent[]) =>
      all.flatMap((e) => (e.type === 'step' || e.type === 'eval' ? [[e.type, e.step, e.loss]] : []));
    const went = log(events);
    t.same(went, log(undisturbed.events).slice(-went.length), `${name}: the rest of the log`);
  }
});

t.test('a finished run that is resumed trains nothing and ends with the same', async (t) => {
  t.testdir({});
  const early = { learningRate: 0.05, maxSteps: 200, earlyStoppingPatience: 2, evalSteps: 4 };
  for (const [name, options] of [
    ['plain', { ...plainRun, maxSteps: 7, saveSteps: 5 }],
    ['rare saves', { ...plainRun, maxSteps: 5, saveSteps: 100 }],
    ['the best', { learningRate: 0.3, maxSteps: 14, saveSteps: 5, evalSteps: 4 }],
    ['early', { ...early, keepBest: false, saveSteps: 250 }],
    ['early, the best', { ...early, saveSteps: 250 }],
  ] as [string, Partial<TrainerOptions>][]) {
    const out = outOf(t, name);
    const first = await resume(tinyRun(out, { ...options, saveTotalLimit: 1 }));
    const files = () =>
      readdirSync(out, { recursive: true, withFileTypes: true })
        .filter((entry) => entry.isFile() && entry.name !== 'report.html')
        .map(({ parentPath, name: file }) => [join(parentPath, file), bytesOf(parentPath, file)])
        .sort();
    const before = files();
    const messages: string[] = [];
    setLogger((_, message) => messages.push(message));
    const second = await resume(tinyRun(out, { ...options, saveTotalLimit: 1 }));
    setLogger(null);
    t.same(second.events, [], `${name}: no step, no evaluation, no checkpoint`);
    t.same(second.result, first.result, `${name}: the same result`);
    t.same(files(), before, `${name}: the same files`);
    t.match(messages.join('\n'), `the run is finished (${first.result.steps} of ${options.maxSteps} steps)`);
  }
});

t.test('what cannot be resumed', async (t) => {
  t.testdir({});
  const out = outOf(t);
  const options = tinyRun(out, { ...plainRun, maxSteps: 6, saveTotalLimit: 9 });
  t.equal((await resume(options)).result.steps, 6, 'without a checkpoint a run starts anew');
  const mismatch = async (changed: Partial<TrainerOptions>, message: RegExp) =>
    t.rejects(resume({ ...options, ...changed }), { code: 'ERR_QLORA_CHECKPOINT_MISMATCH', message, hint: String });
  await mismatch({ learningRate: 2e-3, seed: 7 }, /learningRate 0.002 \(it was 0.01\); seed 7 \(it was 42\)/);
  await mismatch({ dataset: [rowOf(1, 5)] }, /dataset "1 rows/);
  await mismatch({ lora: { r: 4 } }, /lora "14 layers/);
  await mismatch({ model: join(referencesDir('models'), 'llama') }, /model "sha256/);
  await mismatch({ quantization: { type: 'fp4' } }, /model "sha256/);
  const pissa = { ...options, outputDir: outOf(t, 'pissa'), maxSteps: 2 };
  await resume({ ...pissa, lora: { r: 2, init: 'pissa' } });
  await t.rejects(resume({ ...pissa, lora: { r: 2, init: 'pissa', seed: 1 } }), {
    code: 'ERR_QLORA_CHECKPOINT_MISMATCH',
    message: /loraInit "pissa with seed 1" \(it was "pissa with seed 42"\)/,
  });
  await mismatch({ maxSteps: 8 }, /number of steps 8 \(it was 6\), on which cosine rates depend/);
  t.match(await resume({ ...options, saveSteps: 1, optimizer: 'adamw_32bit', outputDir: out }), {
    result: { steps: 6 },
  });

  const invalid = (message: RegExp) => ({ code: 'ERR_QLORA_CHECKPOINT_INVALID', message, hint: String });
  const damages: [RegExp, (folder: string) => void][] = [
    [/optimizer.safetensors is not what was written/, (f) => damage(join(f, 'optimizer.safetensors'))],
    [/trainer-state.json has \d+ bytes/, (f) => writeFileSync(join(f, 'trainer-state.json'), '{}')],
    [/adapter_model.safetensors/, (f) => rmSync(join(f, 'adapter_model.safetensors'))],
    [/manifest.json/, (f) => rmSync(join(f, 'manifest.json'))],
    [/manifest.json/, (f) => writeFileSync(join(f, 'manifest.json'), '{"version":1,"files":{"../a":{}}}')],
    [
      /no regular file/,
      (f) => {
        rmSync(join(f, 'adapter_config.json'));
        symlinkSync(join(out, 'adapter_config.json'), join(f, 'adapter_config.json'));
      },
    ],
  ];
  for (const [what, spoil] of damages) {
    const folder = outOf(t, 'damaged');
    rmSync(folder, { recursive: true, force: true });
    cpSync(out, folder, { recursive: true });
    spoil(join(folder, 'checkpoint-6'));
    const damaged = { ...options, outputDir: folder };
    await t.rejects(resume(damaged, join(folder, 'checkpoint-6')), invalid(what));
    const { events, result } = await resume(damaged);
    t.match(events[0], { type: 'warning', code: 'CHECKPOINT_DAMAGED', message: what });
    t.match(events[1], { type: 'step', step: 5 }, 'the one before it is gone on from');
    t.equal(bytesOf(result.outputDir, 'adapter_model.safetensors'), bytesOf(out, 'adapter_model.safetensors'));
  }
  await t.rejects(resume(options, outOf(t, 'nowhere')), invalid(/nowhere/));
  const named = await resume({ ...options, outputDir: outOf(t, 'other') }, join(out, 'checkpoint-2'));
  t.match(
    named.events.find((e) => e.type === 'step'),
    { step: 3 },
    'a checkpoint of another folder, by its name',
  );
  t.equal(bytesOf(outOf(t, 'other'), 'adapter_model.safetensors'), bytesOf(out, 'adapter_model.safetensors'));
});

function damage(path: string): void {
  const bytes = readFileSync(path);
  bytes[bytes.length - 1] = (bytes.at(-1) as number) ^ 1;
  writeFileSync(path, bytes);
}

t.test('another run in the same folder, and one that is made longer', async (t) => {
  t.testdir({});
  const out = outOf(t);
  const options = tinyRun(out, { ...plainRun, lrScheduler: 'constant', maxSteps: 8 });
  await resume(options);
  const other = { ...options, learningRate: 5e-3 };
  await leaveAt(other, 3);
  const { events } = await resume(other);
  t.ok(events[0]?.type === 'step' && events[0].step < 7, "the older run's checkpoint-8 is not taken for newer");
  await using longer = await QLoRATrainer.create({ ...other, maxSteps: 12, outputDir: outOf(t, 'longer') });
  await longer.train();
  const extended = await resume({ ...other, maxSteps: 12 });
  t.match(extended.events[0], { type: 'step', step: 9 });
  t.equal(bytesOf(out, 'adapter_model.safetensors'), bytesOf(outOf(t, 'longer'), 'adapter_model.safetensors'));
});

t.test('a step that is not finite changes nothing; five in a row name the layer', async (t) => {
  t.testdir({});
  const path = 'model.layers.1.self_attn.q_proj';
  for (const [name, which, value] of [
    ['forward', 'B', Number.NaN],
    // Forward it is multiplied with A, which is zero: only A's gradient overflows.
    ['backward', 'B', 3e38],
  ] as const) {
    const out = outOf(t, name);
    await using trainer = await QLoRATrainer.create(
      tinyRun(out, { ...plainRun, maxSteps: 20, saveSteps: 1, saveTotalLimit: 9 }),
    );
    for await (const e of trainer.train()) if (e.type === 'step' && e.step === 2) break;
    const layers = trainer.adapter?.layers ?? [];
    const layer = layers.find((l) => l.path === path);
    if (!layer) return t.fail(`no ${path}`);
    if (value === 3e38) await layer.write('A', new Float32Array(layer.r * layer.inFeatures));
    await layer.write(which, new Float32Array(layer.outFeatures * layer.r).fill(value));
    const hashes = async () =>
      Promise.all(
        layers.map(async (l) =>
          createHash('sha256')
            .update(new Uint8Array((await l.read('A')).buffer))
            .digest('hex'),
        ),
      );
    const before = await hashes();
    const events: TrainEvent[] = [];
    const run = (async () => {
      for await (const e of trainer.train()) events.push(e);
    })();
    await t.rejects(run, {
      code: 'ERR_QLORA_DIVERGED',
      message: new RegExp(`5 steps in a row.*${path}`),
      detail: { module: path },
      hint: String,
    });
    t.equal(events.filter((e) => e.type === 'warning' && e.code === 'NON_FINITE_GRADIENT').length, 5, name);
    t.same(await hashes(), before, `${name}: no parameter changed`);
    if (name === 'backward') {
      const saved = checkpointsIn(out).sort((a, b) => Number(a.slice(11)) - Number(b.slice(11)));
      t.ok(saved.length > 3);
      const states = saved.slice(-4).map((c) => bytesOf(out, c, 'optimizer.safetensors'));
      t.equal(new Set(states).size, 1, "nor did the optimizer's state");
    }
  }
  const stream = new Stream();
  const p = Tensor.from(stream, Float32Array.of(1, 2), [2]);
  const resolved = resolveTrainerOptions(tinyRun('out'));
  const optimizer = await Optimizer.create(new Map([['p', p]]), resolved, { totalSteps: 2, computeDtype: 'bf16' });
  await p.gradient?.write(Float32Array.of(1, 1));
  for (const [check, changes] of [
    [Number.NaN, false],
    [0, true],
  ] as const) {
    const before = (await p.read())[0];
    optimizer.step(0.1, [Tensor.from(stream, Float32Array.of(check), [1])]).dispose();
    t.equal((await p.read())[0] !== before, changes, `a loss that is ${check ? '' : 'not '}finite`);
  }
  await stream.close();
});

t.test('calls from outside see the parameters of one step', async (t) => {
  t.testdir({});
  const rows = Array.from({ length: 6 }, (_, i) => rowOf(30 + i, 6));
  const options = tinyRun(outOf(t), { keepBest: false, evalDataset: rows, evalSteps: 1, maxSteps: 12, saveSteps: 100 });
  await using trainer = await QLoRATrainer.create(options);
  const seen = new Set([(await trainer.evaluate()).loss]);
  const run = trainer.train();
  const outside: Promise<number>[] = [];
  for await (const e of run) {
    if (e.type === 'eval') seen.add(e.loss);
    if (e.type !== 'step') continue;
    outside.push(trainer.evaluate(rows).then(({ loss }) => loss));
    if (e.step === 5) await trainer.save(outOf(t, 'between'));
  }
  for (const loss of await Promise.all(outside)) t.ok(seen.has(loss), `${loss} is the loss after a step`);
});

t.test('a disk that fails while a run stops is an error', async (t) => {
  const out = join(t.testdir({ out: {} }), 'out');
  await using trainer = await QLoRATrainer.create(tinyRun(out, { ...plainRun, saveSteps: 100 }));
  const leaving = (async () => {
    for await (const e of trainer.train()) {
      if (e.type !== 'step' || e.step < 3) continue;
      rmSync(out, { recursive: true });
      writeFileSync(out, 'a file');
      break;
    }
  })();
  await t.rejects(leaving, { name: 'QLoRAError', code: 'ERR_QLORA_WRITE_FAILED', hint: String });
  rmSync(out);
  const { steps, stopped } = await trainer.train({ signal: AbortSignal.abort() });
  t.ok(stopped && steps >= 3, 'nothing that was trained is lost: another try saves it');
  t.same(checkpointsIn(out), [`checkpoint-${steps}`]);
});
