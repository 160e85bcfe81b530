/** Memory: what plan() says is what a run takes; maxMemory; layers that are computed again because it demands it. */
import { createHash } from 'node:crypto';
import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import t, { type Test } from 'tap';
import { type MemoryPlan, memory, QLoRATrainer, QuantizedModel, type TrainerOptions } from '../../lib/index.js';
import { writeRandomLlama } from '../support/random-llama.js';
import { packageRoot, referencesDir } from '../support/references.js';

const demo = join(packageRoot(), 'examples', 'demo', 'model');
const tiny = join(referencesDir('models'), 'llama');
const windowed = join(referencesDir('models'), 'qwen2-yarn');
const random = t.testdir();
writeRandomLlama(random);

const rowOf = (length: number, i: number) => ({ inputIds: Array.from({ length }, (_, k) => (11 * i + 7 * k) % 200) });
const rows = Array.from({ length: 24 }, (_, i) => rowOf(40 + ((i * 37) % 150), i));

const optionsOf = (t: Test, options: Partial<TrainerOptions>): TrainerOptions => ({
  model: random,
  dataset: rows,
  outputDir: join(t.testdirName, 'out'),
  gradientAccumulationSteps: 1,
  maxSteps: 2,
  groupByLength: true, // the longest row comes in the first step
  ...(options.lora || options.initialAdapter ? {} : { lora: { r: 8 } }),
  ...options,
});

async function peakOf(options: TrainerOptions): Promise<number> {
  await using trainer = await QLoRATrainer.create(options);
  await trainer.train();
  return trainer.model.memory().peakBytes;
}

const classes = ['weights', 'adapters', 'optimizer', 'activations', 'scratch'] as const;

t.test('counted peak bytes are what was planned', async (t) => {
  const shapes: Record<string, Partial<TrainerOptions>> = {
    'the defaults': {},
    'all layers kept': { gradientCheckpointing: false },
    'a large micro-batch': { batchSize: 6 },
    'a large micro-batch, all layers kept': { batchSize: 6, gradientCheckpointing: false },
    'a high rank': { lora: { r: 128 } },
    'few layers adapted, DoRA, dropout': { lora: { r: 8, useDora: true, dropout: 0.1, targetModules: ['q_proj'] } },
    'f32, 16-bit base': { computeDtype: 'f32', quantization: 'none', batchSize: 2 },
    '8-bit base': { quantization: { type: 'int8' }, batchSize: 3 },
    'single quantization, large blocks': { quantization: { blockSize: 256, doubleQuant: false } },
    'full fine-tuning': { lora: 'none', quantization: 'none' },
    'full fine-tuning, SGD': { lora: 'none', quantization: 'none', optimizer: 'sgd', batchSize: 4 },
    'SGD with momentum': { optimizer: 'sgd', momentum: 0.9, lora: { r: 64 } },
    'AdamW in 8 bits': { optimizer: 'adamw_8bit', lora: { r: 64 } },
    'AdEMAMix, LoRA+, NEFTune, f16': {
      optimizer: 'ademamix',
      lora: { r: 32 },
      loraPlusRatio: 4,
      neftuneNoiseAlpha: 5,
      computeDtype: 'f16',
    },
    // Small ranks, whose numbers of a rehearsal are the least like numbers.
    ...Object.fromEntries([2, 3, 5].map((r) => [`PiSSA of rank ${r}`, { lora: { r, init: 'pissa' } }])),
    'PiSSA, modules trained whole': { lora: { init: 'pissa', modulesToSave: ['lm_head', 'norm', 'q_proj'] } },
    packing: { packing: true, maxLength: 512, batchSize: 2 },
    'rows in any order': { groupByLength: false, batchSize: 3 },
    'long rows to evaluate': { evalDataset: [rowOf(700, 3), rowOf(600, 4)], batchSize: 2 },
    'a small model with a tokenizer': {
      model: demo,
      dataset: rows.map(() => ({ text: 'One and two are three. '.repeat(9) })),
    },
    'a tiny model': { model: tiny, batchSize: 4 },
    'biases and windows': { model: windowed, batchSize: 3, lora: { r: 4, useDora: true } },
  };
  for (const [name, options] of Object.entries(shapes)) {
    const all = optionsOf(t, options);
    const plan = await QLoRATrainer.plan(all);
    const ratio = (await peakOf(all)) / plan.total;
    t.ok(ratio >= 0.98 && ratio <= 1.02, `${name}: ${ratio.toFixed(4)} of ${plan.total}`);
    t.equal(
      classes.reduce((sum, name) => sum + plan[name], 0),
      plan.total,
      'the classes add up',
    );
    for (const of of classes) t.ok(Number.isInteger(plan[of]) && plan[of] >= 0, `${of}: ${plan[of]}`);
  }
});

t.test('what each option costs', async (t) => {
  const plan = (options: Partial<TrainerOptions> = {}) => QLoRATrainer.plan(optionsOf(t, options));
  const usual = await plan();
  await using model = await QuantizedModel.load(random);
  const { weights } = model.memory().byClass;
  t.equal(usual.weights, weights, 'the weights, to the byte');
  const adapter = model.addLora('a', { r: 8 });
  t.equal(usual.adapters, 4 * adapter.trainableParameters);
  // With the counters of a step.
  t.equal(usual.optimizer, 12 * adapter.trainableParameters + 12, 'gradient and two moments');
  t.equal((await plan({ optimizer: 'sgd' })).optimizer, 4 * adapter.trainableParameters + 12, 'the gradient');
  t.equal((await plan({ lora: { r: 16 } })).adapters, 2 * usual.adapters);
  const grows = async (
    key: Exclude<keyof MemoryPlan, 'pinned'>,
    options: Partial<TrainerOptions>,
    factor: [number, number],
  ) => {
    const ratio = (await plan(options))[key] / usual[key];
    t.ok(ratio > factor[0] && ratio < factor[1], `${key}, ${JSON.stringify(options).slice(0, 60)}: ${ratio}`);
  };
  await grows('activations', { batchSize: 4 }, [3, 4.2]);
  await grows('activations', { gradientCheckpointing: false }, [2, 10]);
  await grows('activations', { dataset: rows.map((_, i) => rowOf(40, i)) }, [0.1, 0.5]);
  await grows('weights', { quantization: 'none' }, [2, 4]);
  await grows('total', { gradientAccumulationSteps: 8 }, [0.999, 1.001]);
  // A model that is loaded already, with another adapter that stays.
  const loaded = await plan({ model, quantization: undefined });
  t.equal(loaded.weights, usual.weights);
  t.equal(loaded.adapters, 2 * usual.adapters);
  t.equal(model.adapters.size, 1, 'nothing was added to it');
});

t.test('planning loads nothing and leaves nothing', async (t) => {
  const before = memory()[0]?.liveBytes;
  const rss = process.memoryUsage.rss();
  const huge = { batchSize: 24, dataset: Array.from({ length: 24 }, (_, i) => rowOf(1000, i)), lora: { r: 512 } };
  const plan = await QLoRATrainer.plan(optionsOf(t, { ...huge, gradientCheckpointing: false }));
  t.ok(plan.total > 1.5e9, `${plan.total} bytes`);
  t.equal(memory()[0]?.liveBytes, before);
  const { peakBytes } = memory()[0] as { peakBytes: number };
  t.ok(peakBytes < plan.total, 'and is no part of what the process counts');
  t.ok(process.memoryUsage.rss() - rss < plan.total / 4, 'nor of what it holds');
});

t.test('a plan above maxMemory is an error, with changes that would fit', async (t) => {
  t.testdir(); // what an earlier run left is gone
  const wide = { batchSize: 8, gradientCheckpointing: false, optimizer: 'sgd', lora: { r: 32 } } as const;
  const { total } = await QLoRATrainer.plan(optionsOf(t, wide));
  t.equal(
    (await QLoRATrainer.plan(optionsOf(t, { ...wide, maxMemory: 1 }))).total,
    total,
    'plan() answers all the same',
  );
  const refused = async (maxMemory: number, options: Partial<TrainerOptions> = wide) => {
    const before = memory()[0]?.peakBytes;
    try {
      await QLoRATrainer.create(optionsOf(t, { ...options, maxMemory }));
    } catch (error) {
      t.match(error, { code: 'ERR_QLORA_MEMORY_PLAN', hint: String, detail: { maxMemory, plan: { total: Number } } });
      t.match((error as Error).message, /weights .*adapters .*optimizer .*activations .*scratch/);
      t.equal(memory()[0]?.peakBytes, before, 'nothing was loaded');
      t.throws(() => readdirSync(join(t.testdirName, 'out')), 'and nothing written');
      return (error as { hint: string }).hint;
    }
    t.fail(`${maxMemory} bytes were enough`);
    return '';
  };
  {
    await using trainer = await QLoRATrainer.create(optionsOf(t, { ...wide, maxMemory: total }));
    t.ok((await trainer.trainStep(rows.slice(0, 2))).loss > 0);
    await t.rejects(trainer.trainStep([rowOf(1000, 1), rowOf(1000, 2), rowOf(1000, 3)]), {
      code: 'ERR_QLORA_OUT_OF_MEMORY',
      message: /the limit is/,
    });
    t.ok((await trainer.trainStep(rows.slice(0, 2))).loss > 0, 'what fits still does');
  }
  const little = await refused(total - 1);
  t.match(
    little,
    /^Any of these would fit: gradientCheckpointing: true; batchSize: 4 with .*Steps: 2; maxLength: \d+; lora: \{ r: 16 \}/,
  );
  t.notMatch(await refused(total / 2), /lora: \{ r/, 'what is not enough alone is not advised');
  // Each advice is true.
  for (const [text, options] of [
    ['gradientCheckpointing: true', { gradientCheckpointing: true }],
    ['batchSize: 4', { batchSize: 4, gradientAccumulationSteps: 2 }],
    ['lora: { r: 16 }', { lora: { r: 16 } }],
  ] as const) {
    t.ok(little.includes(text));
    t.ok((await QLoRATrainer.plan(optionsOf(t, { ...wide, ...options }))).total < total, text);
  }
  const weights = (await QLoRATrainer.plan(optionsOf(t, wide))).weights;
  t.match(await refused(weights * 2.5), /^These together would fit: gradientCheckpointing: true, batchSize: 1/);
  t.match(await refused(weights / 2), /^Even with .* it takes .*smaller model/);
});

t.test("gradientCheckpointing 'auto' computes as few layers again as memory demands, to the same bits", async (t) => {
  const options = { batchSize: 4, maxSteps: 2 };
  const plan = (gradientCheckpointing: TrainerOptions['gradientCheckpointing'], maxMemory?: number) =>
    QLoRATrainer.plan(optionsOf(t, { ...options, gradientCheckpointing, maxMemory }));
  const [all, none] = [(await plan(true)).total, (await plan(false)).total];
  t.equal((await plan('auto')).total, none, 'without maxMemory this machine has enough');
  t.equal((await plan('auto', none)).total, none);
  t.equal((await plan('auto', all)).total, all);
  t.equal((await plan('auto', all / 2)).total, all, 'more cannot be done');
  const middle = Math.floor((all + none) / 2);
  const some = (await plan('auto', middle)).total;
  t.ok(some <= middle && some > all, `between: ${some} of ${middle}`);
  const bits = async (gradientCheckpointing: TrainerOptions['gradientCheckpointing'], maxMemory?: number) => {
    await using trainer = await QLoRATrainer.create(optionsOf(t, { ...options, gradientCheckpointing, maxMemory }));
    const { finalLoss } = await trainer.train();
    const tensors = await Promise.all((trainer.adapter?.layers ?? []).flatMap((l) => [l.read('A'), l.read('B')]));
    const text = Buffer.concat(tensors.map((values) => Buffer.from(values.buffer))).toString('base64');
    return { peak: trainer.model.memory().peakBytes, trained: { finalLoss, text } };
  };
  const kept = await bits(false);
  for (const [name, maxMemory] of [
    ['some layers', middle],
    ['all layers', all],
  ] as const) {
    const again = await bits('auto', maxMemory);
    t.ok(again.peak <= maxMemory, `${name}: ${again.peak} of ${maxMemory}`);
    t.ok(again.trained.text === kept.trained.text, `${name}: the same adapter`);
    t.equal(again.trained.finalLoss, kept.trained.finalLoss);
  }
});

t.test('a paged optimizer keeps as much of its state on the disk as maxMemory demands, to the same bits', async (t) => {
  const options = { lora: { r: 256 }, maxSteps: 2 } as const;
  const plan = (more: Partial<TrainerOptions> = {}) => QLoRATrainer.plan(optionsOf(t, { ...options, ...more }));
  const whole = await plan();
  const state = (2 / 3) * whole.optimizer;
  t.equal((await plan({ maxMemory: whole.total })).total, whole.total, 'where all fits, nothing is paged');
  const maxMemory = Math.floor(whole.total - state / 2);
  const paged = await plan({ maxMemory });
  t.ok(
    paged.total <= maxMemory && paged.total > 0.95 * maxMemory,
    `${paged.total} of ${maxMemory}: no more than it must`,
  );
  t.ok(paged.optimizer < whole.optimizer - 0.45 * state, 'what was saved is state');
  const trained = async (more: Partial<TrainerOptions> = {}) => {
    await using trainer = await QLoRATrainer.create(optionsOf(t, { ...options, ...more }));
    const { finalLoss } = await trainer.train();
    const tensors = await Promise.all((trainer.adapter?.layers ?? []).flatMap((l) => [l.read('A'), l.read('B')]));
    const hash = createHash('sha256').update(Buffer.concat(tensors.map((values) => Buffer.from(values.buffer))));
    return { peak: trainer.model.memory().peakBytes, result: { finalLoss, adapter: hash.digest('hex') } };
  };
  const there = await trained({ maxMemory });
  t.ok(there.peak <= maxMemory && there.peak > 0.9 * paged.total, `${there.peak} of ${paged.total}`);
  t.same(there.result, (await trained()).result);
  // Without one it is advised.
  await t.rejects(QLoRATrainer.create(optionsOf(t, { ...options, maxMemory, optimizer: 'adamw_32bit' })), {
    code: 'ERR_QLORA_MEMORY_PLAN',
    hint: /optimizer: 'paged_adamw_32bit'/,
  });
});
