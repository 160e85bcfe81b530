/** QLoRATrainer as api.d.ts and behaviour.md promise it, on tiny models. */
import { createHash } from 'node:crypto';
import { join } from 'node:path';
import { setImmediate } from 'node:timers/promises';
import t, { type Test } from 'tap';
import { EncodedRows } from '../../lib/data/encoded-rows.js';
import {
  type QLoRATrainer,
  QuantizedModel,
  type Row,
  setLogger,
  type TrainEvent,
  type TrainerOptions,
} from '../../lib/index.js';
import { create, demo, plain, rowOf, rows, tiny } from '../support/trainers.js';

const hash = (values: Float32Array) => createHash('sha256').update(new Uint8Array(values.buffer)).digest('hex');
const close = (t: Test, a: number, b: number, what: string, allowed = 1e-5) =>
  t.ok(Math.abs(a - b) <= allowed * Math.max(1, Math.abs(b)), `${what}: ${a} and ${b}`);

async function adapterOf({ adapter }: QLoRATrainer): Promise<Float32Array[]> {
  return Promise.all((adapter?.layers ?? []).flatMap((layer) => [layer.read('A'), layer.read('B')]));
}

/** Bits to compare: typed arrays themselves are compared element by element, which takes seconds. */
async function bitsOf(trainer: QLoRATrainer): Promise<string[]> {
  return (await adapterOf(trainer)).map(hash);
}

async function eventsOf(run: AsyncIterable<TrainEvent>): Promise<TrainEvent[]> {
  const events: TrainEvent[] = [];
  for await (const event of run) events.push(event);
  return events;
}
const stepsOf = (events: readonly TrainEvent[]) => events.filter((e) => e.type === 'step');

t.test('rows from everywhere, in every form', async (t) => {
  const forms: Row[] = [
    { instruction: 'What is 1 plus 2?', output: '3' },
    { instruction: 'Add.', input: '1 2', output: '3' },
    { prompt: '1 + 2 = ', completion: '3' },
    { text: 'One and two are three.' },
    {
      messages: [
        { role: 'user', content: '1 plus 2?' },
        { role: 'assistant', content: '3' },
      ],
    },
    { inputIds: [5, 6, 7] },
    { inputIds: [5, 6, 7], labels: [-100, -100, 7] },
  ];
  const jsonl = forms.map((row) => JSON.stringify(row)).join('\n');
  const folder = t.testdir({ 'a.jsonl': jsonl, 'a.json': JSON.stringify(forms), empty: { 'x.jsonl': '' } });
  async function* later() {
    yield* forms;
  }
  const model = await QuantizedModel.load(demo);
  const losses: number[] = [];
  for (const dataset of [
    forms,
    new Set(forms),
    later(),
    join(folder, 'a.jsonl'),
    join(folder, 'a.json'),
    [{ source: forms }],
  ]) {
    const trainer = await create(t, { model, dataset, evalDataset: forms });
    losses.push((await trainer.evaluate()).loss);
    const trainedHere = await trainer.evaluate(forms.slice(0, 2));
    t.ok(trainedHere.loss > 0 && Math.abs(trainedHere.perplexity - Math.exp(trainedHere.loss)) < 1e-9);
    await trainer.dispose();
    model.removeLora('default');
  }
  t.same(new Set(losses).size, 1, 'the same rows, the same loss');
  t.equal(model.core.stream.closed, false, 'a model passed in is not disposed of');
  const trainer = await create(t, { model });
  const explained = await trainer.explain(forms[2] as Row);
  t.same(explained.tokens.join(''), '<s>1 + 2 = 3</s>');
  t.equal(explained.ids.length, explained.trained.length);
  t.ok(explained.trained.at(-1) && !explained.trained[0]);
  t.equal(explained.truncated, 0);
  await t.rejects(trainer.explain({ instructon: 'x' } as unknown as Row), {
    code: 'ERR_QLORA_ROW_INVALID',
    hint: String,
  });
  await t.rejects(create(t, { model, dataset: join(folder, 'empty') }), {
    code: 'ERR_QLORA_DATASET_EMPTY',
    hint: String,
  });
  await trainer.dispose();
  await model.dispose();
});

t.test('how rows are cut into micro-steps changes neither loss nor gradient', async (t) => {
  const results = [];
  for (const [batchSize, gradientAccumulationSteps] of [
    [4, 1],
    [2, 2],
    [1, 4],
    [3, 2],
  ]) {
    await using trainer = await create(t, { ...plain, batchSize, gradientAccumulationSteps });
    results.push(await trainer.trainStep(rows));
    const { loss } = await trainer.evaluate(rows);
    t.ok(loss < (results[0]?.loss as number), 'the step went downhill');
  }
  for (const { loss, gradNorm } of results) {
    close(t, loss, results[0]?.loss as number, 'loss');
    close(t, gradNorm, results[0]?.gradNorm as number, 'gradient norm');
  }
  // The mean over tokens, not over rows.
  await using model = await QuantizedModel.load(tiny, plain);
  let sum = 0;
  let tokens = 0;
  for (const { inputIds } of rows) {
    sum += (await model.loss(inputIds)) * (inputIds.length - 1);
    tokens += inputIds.length - 1;
  }
  close(t, results[0]?.loss as number, sum / tokens, 'loss of the rows one by one');
});

t.test('SGD and clipping, by hand', async (t) => {
  const learningRate = 0.5;
  for (const maxGradNorm of [0, 0.1]) {
    await using trainer = await create(t, { ...plain, optimizer: 'sgd', learningRate, maxGradNorm });
    const before = await adapterOf(trainer);
    const { gradNorm } = await trainer.trainStep(rows);
    const after = await adapterOf(trainer);
    // The change is -lr * gradient * min(1, maxNorm / norm): its length tells.
    let squares = 0;
    for (const [i, values] of after.entries()) {
      for (const [k, v] of values.entries()) squares += (v - (before[i]?.[k] as number)) ** 2;
    }
    t.ok(gradNorm > 0.1);
    close(t, Math.sqrt(squares), learningRate * (maxGradNorm || gradNorm), `maxGradNorm ${maxGradNorm}`, 1e-3);
    // B's gradient by finite differences: B starts at zero, the loss is smooth there.
    const layer = trainer.adapter?.layers[0];
    if (!layer || maxGradNorm) continue;
    const index = after[1]?.reduce(
      (best, v, k, all) => (Math.abs(v) > Math.abs(all[best] as number) ? k : best),
      0,
    ) as number;
    const gradient = -(after[1]?.[index] as number) / learningRate;
    const lossAt = async (h: number) => {
      for (const [i, other] of (trainer.adapter?.layers ?? []).entries()) {
        await other.write('A', before[2 * i] as Float32Array);
        const b = new Float32Array(before[2 * i + 1]?.length as number);
        if (i === 0) b[index] = h;
        await other.write('B', b);
      }
      return (await trainer.evaluate(rows)).loss;
    };
    const numeric = ((await lossAt(0.05)) - (await lossAt(-0.05))) / 0.1;
    close(t, gradient, numeric, 'gradient', 2e-3);
  }
});

t.test('schedules, warm-up, epochs and events', async (t) => {
  await using linear = await create(t, { lrScheduler: 'linear', warmupSteps: 2, maxSteps: 6 });
  const events = await eventsOf(linear.train());
  const rates = stepsOf(events).map((e) => e.learningRate);
  for (const [i, share] of [0, 0.5, 1, 0.75, 0.5, 0.25].entries())
    close(t, rates[i] as number, 1e-2 * share, `step ${i + 1}`, 1e-9);
  t.same(
    stepsOf(events).map((e) => [e.step, e.epoch]),
    [1, 2, 3, 4, 5, 6].map((n) => [n, n / 2]),
  );
  for (const e of stepsOf(events)) t.ok(e.loss > 0 && e.gradNorm > 0 && e.tokensPerSecond > 0 && e.memoryBytes > 0);
  const result = async (options: Partial<TrainerOptions>) => {
    await using trainer = await create(t, options);
    return await trainer.train();
  };
  t.equal((await result({})).steps, 6, '3 epochs of 2 steps');
  t.equal((await result({ epochs: 1 })).steps, 2);
  t.equal((await result({ epochs: 0.5 })).steps, 1);
  t.equal((await result({ epochs: 2, maxSteps: 3 })).steps, 3, 'the first that is reached');
  t.equal((await result({ epochs: 1, maxTrainSamples: 1 })).steps, 1);
  const last = await result({ maxSteps: 4 });
  t.match(last, { stopped: false, steps: 4, finalLoss: Number });
  t.equal(last.outputDir, last.adapterDir);
});

t.test('evaluation: splits, evalSteps', async (t) => {
  const many = Array.from({ length: 10 }, (_, i) => rowOf(i, 8));
  const evals = async (evalDataset: number | Row[], options: Partial<TrainerOptions> = {}) => {
    await using trainer = await create(t, {
      dataset: many,
      evalDataset,
      maxSteps: 4,
      gradientAccumulationSteps: 1,
      ...options,
    });
    const events = await eventsOf(trainer.train());
    return events.filter((e) => e.type === 'eval');
  };
  t.same(
    (await evals(3, { evalSteps: 2 })).map((e) => e.step),
    [2, 4],
  );
  t.same(
    (await evals(0.2)).map((e) => e.step),
    [4],
    'by default at the end',
  );
  t.same(await evals(3), await evals(3), 'the split is seeded');
  t.notSame(await evals(3), await evals(3, { seed: 7 }));
  await t.rejects(evals(10), { code: 'ERR_QLORA_EVAL_SPLIT', hint: String });
  await using none = await create(t);
  await t.rejects(none.evaluate(), { code: 'ERR_QLORA_NO_EVAL_DATASET', hint: String });
});

t.test('rows are there until they were evaluated', async (t) => {
  const { close, rows: read } = EncodedRows.prototype;
  const closed = new Set<EncodedRows>();
  t.teardown(() => Object.assign(EncodedRows.prototype, { close, rows: read }));
  EncodedRows.prototype.close = async function () {
    closed.add(this);
    await close.call(this);
  };
  EncodedRows.prototype.rows = async function (indices) {
    if (closed.has(this)) throw new Error('read after they were closed');
    return read.call(this, indices);
  };
  const trainer = await create(t, { evalDataset: rows });
  const { loss } = await trainer.evaluate(rows);
  t.ok(loss > 0);
  t.equal(closed.size, 1, 'they are closed');
  const waiting = trainer.evaluate();
  await setImmediate();
  await trainer.dispose();
  t.same((await waiting).loss, loss, 'dispose() waits for what was begun');
});

t.test('dropout and seeds', async (t) => {
  const run = async (dropout: number, seed: number) => {
    await using trainer = await create(t, { lora: { r: 4, dropout }, seed, maxSteps: 3 });
    const evaluated = (await trainer.evaluate(rows)).loss;
    const again = (await trainer.evaluate(rows)).loss;
    await trainer.train();
    return {
      evaluated,
      again,
      adapter: await bitsOf(trainer),
    };
  };
  const first = await run(0.3, 1);
  t.same(await run(0.3, 1), first, 'the same seed, the same adapter');
  t.equal(first.again, first.evaluated, 'evaluation has no dropout');
  const without = await run(0, 1);
  t.equal(without.evaluated, first.evaluated);
  t.notSame(without.adapter, first.adapter, 'training has');
  t.notSame((await run(0.3, 2)).adapter, first.adapter);
});

t.test('leaving the loop, stop() and a signal keep the last whole step', async (t) => {
  const abort = new AbortController();
  const ways: Record<
    string,
    (trainer: QLoRATrainer, at: number) => Promise<{ steps: number; outputDir: string; stopped: boolean }>
  > = {
    async leave(trainer, at) {
      const run = trainer.train();
      for await (const e of run) if (e.type === 'step' && e.step === at) break;
      return run;
    },
    async stop(trainer, at) {
      const run = trainer.train();
      for await (const e of run) if (e.type === 'step' && e.step === at) void run.stop();
      return run;
    },
    async signal(trainer, at) {
      const run = trainer.train({ signal: abort.signal });
      for await (const e of run) if (e.type === 'step' && e.step === at) abort.abort();
      return run;
    },
    aborted: (trainer) => trainer.train({ signal: AbortSignal.abort() }),
  };
  for (const [name, way] of Object.entries(ways)) {
    // With an evaluation at the end, which is left out; at 5 the last step is left.
    for (const at of name === 'leave' ? [2, 5] : [2]) {
      const options = { maxSteps: 5, evalDataset: rows, outputDir: join(t.testdirName, name) };
      await using trainer = await create(t, options);
      const result = await way(trainer, at);
      t.equal(result.stopped, true, name);
      if (name === 'aborted') continue;
      t.ok(result.steps >= at && result.steps <= at + 2, `${name}: ${result.steps} steps`);
      t.equal(result.outputDir, join(t.testdirName, name, `checkpoint-${result.steps}`));
      await using model = await QuantizedModel.load(tiny);
      const loaded = await model.loadLora('a', result.outputDir);
      for (const [i, layer] of loaded.layers.entries()) {
        t.equal(
          hash(await layer.read('B')),
          hash((await trainer.adapter?.layers[i]?.read('B')) as Float32Array),
          `${name}: the checkpoint holds what was trained`,
        );
      }
      // As many whole steps as it says, and nothing of the one that was dropped.
      await using calm = await create(t, { ...options, evalDataset: undefined, maxSteps: result.steps });
      await calm.train();
      t.same(await bitsOf(calm), await bitsOf(trainer), `${name}: ${result.steps} undisturbed steps`);
    }
  }
});

t.test('an option that changes nothing is told of', async (t) => {
  t.teardown(() => setLogger(null));
  const told = async (options: Partial<TrainerOptions>) => {
    const names: unknown[] = [];
    setLogger((level, _, fields) => level === 'warn' && names.push((fields as { option?: string }).option));
    await (await create(t, options)).dispose();
    return names;
  };
  const sgd = { optimizer: 'sgd', lrScheduler: 'cosine', evalDataset: rows } as const;
  const given = { momentum: 0.9, maxEvalSamples: 2, warmupSteps: 3, schedulerOptions: { numCycles: 1 } };
  t.same(await told(given), ['momentum', 'maxEvalSamples', 'warmupSteps', 'schedulerOptions']);
  t.same(await told({ ...given, ...sgd }), [], 'these take effect');
  t.same(await told({ ...sgd, adamBeta2: 0.99, adamEpsilon: 1e-8 }), ['adamBeta2'], 'a default says nothing');
});

t.test('one run at a time', async (t) => {
  await using trainer = await create(t, { maxSteps: 3 });
  const run = trainer.train();
  const busy = { code: 'ERR_QLORA_BUSY', hint: String };
  await t.rejects(async () => trainer.train(), busy);
  await t.rejects(trainer.trainStep(rows), busy);
  t.ok((await trainer.model.logits([1, 2])).length > 0, 'calls on the model run between its steps');
  t.equal((await run).steps, 3);
  const left = await create(t, { maxSteps: 500 });
  const endless = left.train();
  await left.trainStep(rows).catch(() => {});
  await left.dispose();
  t.equal((await endless).stopped, true, 'dispose() stops a run before it frees what that needs');
});

t.test('an output folder that cannot be made is found before the first step', async (t) => {
  const folder = t.testdir({ file: 'x' });
  await using trainer = await create(t, { outputDir: join(folder, 'file', 'out') });
  const events: TrainEvent[] = [];
  const training = (async () => {
    for await (const event of trainer.train()) events.push(event);
  })();
  await t.rejects(training, { name: 'QLoRAError', code: 'ERR_QLORA_WRITE_FAILED', message: /file/, hint: String });
  t.same(events, []);
});

t.test('what is wrong is found before weights are read', async (t) => {
  const told: string[] = [];
  setLogger((_, message) => told.push(message));
  t.teardown(() => setLogger(null));
  const missing = join(t.testdirName, 'none.jsonl');
  for (const [options, code] of [
    [{ dataset: missing }, 'ERR_QLORA_DATASET_NOT_FOUND'],
    [{ dataset: [{ source: rows }, { source: missing }] }, 'ERR_QLORA_DATASET_NOT_FOUND'],
    [{ evalDataset: missing }, 'ERR_QLORA_DATASET_NOT_FOUND'],
    [{ template: 'alpacca' }, 'ERR_QLORA_TEMPLATE_UNKNOWN'],
    [{ lora: { targetModules: ['q_prj'] } }, 'ERR_QLORA_ADAPTER_TARGETS'],
    [{ lora: { targetModules: /.*\.query/ } }, 'ERR_QLORA_ADAPTER_TARGETS'],
    [{ initialAdapter: join(t.testdirName, 'adapter'), lora: undefined }, 'ERR_QLORA_ADAPTER_NOT_FOUND'],
  ] as const) {
    await t.rejects(create(t, { model: demo, ...options } as TrainerOptions), { code, hint: String });
    t.same(told, [], `${code}: nothing was loaded, and no row read`);
  }
  const trainer = await create(t, { model: demo, lora: { targetModules: ['q_proj'] } });
  t.match(told[0], /^loaded .*model$/);
  await trainer.dispose();
});
