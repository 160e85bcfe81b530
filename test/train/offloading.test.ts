/** Activation offloading on an emulated device, where a copy arrives when it is waited for and not before. */
process.env.QLORA_CUDA = 'emulated';

import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import t, { type Test } from 'tap';
import { QLoRATrainer, setLogger, type TrainerOptions } from '../../lib/index.js';
import { writeRandomLlama } from '../support/random-llama.js';
import { packageRoot } from '../support/references.js';

const addon = (createRequire(import.meta.url)('node-gyp-build') as { path: (root: string) => string }).path(
  packageRoot(),
);
const emulated = existsSync(join(dirname(addon), 'libqlora_cuda_emulated.so'));
const skip = emulated ? false : 'npm run build:cuda-emulated was not run';

const sizes = { hidden: 32, intermediate: 48, heads: 4, kvHeads: 2, vocabulary: 100 };
const folder = t.testdir({ 4: {}, 8: {} });
const modelOf = (layers: 4 | 8) => join(folder, String(layers));
for (const layers of [4, 8] as const) writeRandomLlama(modelOf(layers), { ...sizes, layers });

const tokens = 40;
const rows = Array.from({ length: 6 }, (_, i) => ({
  inputIds: Array.from({ length: tokens - (i % 3) }, (_, k) => (11 * i + 7 * k) % 100),
}));
/** A kept input of the longest row, in bf16. */
const inputBytes = 2 * tokens * sizes.hidden;

const optionsOf = (t: Test, options: Partial<TrainerOptions>): TrainerOptions => ({
  model: modelOf(4),
  dataset: rows,
  outputDir: join(t.testdirName, 'out'),
  device: 'cuda:0',
  gradientAccumulationSteps: 2,
  maxSteps: 2,
  groupByLength: true, // the longest row comes in the first step
  ...(options.lora ? {} : { lora: { r: 4, dropout: 0.1 } }),
  ...options,
});

/** What a run leaves: losses, gradient norms and the trained numbers; and what it took. */
async function trained(options: TrainerOptions, from?: string) {
  await using trainer = await QLoRATrainer.create(options);
  const steps: unknown[] = [];
  const run = trainer.train({ resume: from ?? false });
  for await (const event of run) if (event.type === 'step') steps.push([event.step, event.loss, event.gradNorm]);
  const { stream, weights } = trainer.model.core;
  const parameters = trainer.adapter?.parameters ?? [...weights.dense.values()];
  const hash = createHash('sha256');
  for (const p of parameters) hash.update(new Uint8Array((await p.readBits()).buffer));
  await stream.sync();
  return { bits: { steps, parameters: hash.digest('hex') }, memory: stream.memory() };
}

t.test('the same bits from less memory of the device, as planned', { skip }, async (t) => {
  const shapes: Record<string, Partial<TrainerOptions>> = {
    'the defaults': {},
    'padded rows, f16': { batchSize: 2, computeDtype: 'f16' },
    'noise, some layers kept whole': { neftuneNoiseAlpha: 5, gradientCheckpointing: 'auto' },
    'full fine-tuning': { lora: 'none', quantization: 'none' },
  };
  for (const [name, shape] of Object.entries(shapes)) {
    await t.test(name, async (t) => {
      const options = optionsOf(t, shape);
      if (options.gradientCheckpointing === 'auto') {
        const totals = [true, false].map(
          async (all) => (await QLoRATrainer.plan({ ...options, gradientCheckpointing: all })).total,
        );
        const [least = 0, most = 0] = await Promise.all(totals);
        options.maxMemory = Math.ceil(least + (most - least) / 3);
      }
      const usual = await trained(options);
      const offloading = { ...options, activationOffloading: true };
      const plan = await QLoRATrainer.plan(offloading);
      const less = await trained(offloading);
      t.same(less.bits, usual.bits);
      t.equal(usual.memory.pinnedPeakBytes, 0);
      t.equal(less.memory.pinnedPeakBytes, plan.pinned, 'what the host holds, to the byte');
      t.equal(less.memory.pinnedBytes, 0, 'and lets go of');
      const ratio = less.memory.peakBytes / plan.total;
      t.ok(ratio > 0.98 && ratio < 1.02, `${less.memory.peakBytes} of ${plan.total}`);
      t.ok((less.memory.peakByClass.activations as number) <= 1.02 * plan.activations, 'and so for activations');
      t.ok(less.memory.peakBytes <= usual.memory.peakBytes);
    });
  }
});

t.test('the device holds as much of many layers as of few', { skip }, async (t) => {
  const plan = (layers: 4 | 8, activationOffloading: boolean) =>
    QLoRATrainer.plan(optionsOf(t, { model: modelOf(layers), activationOffloading }));
  const [few, many] = [await plan(4, true), await plan(8, true)];
  t.equal(many.activations, few.activations);
  t.same([few.pinned, many.pinned], [3 * inputBytes, 7 * inputBytes], "all but the last layer's");
  const [fewKept, manyKept] = [await plan(4, false), await plan(8, false)];
  t.equal(manyKept.activations - fewKept.activations, 4 * inputBytes);
  t.equal(manyKept.pinned, undefined);
  t.ok(manyKept.activations - many.activations >= 5 * inputBytes, 'some two of them are left');
  // Where the limit is between, it is advised.
  const maxMemory = Math.floor((many.total + manyKept.total) / 2);
  const limited = optionsOf(t, { model: modelOf(8), maxMemory });
  await t.rejects(QLoRATrainer.create(limited), {
    code: 'ERR_QLORA_MEMORY_PLAN',
    hint: /activationOffloading: true/,
  });
  const { memory: taken } = await trained({ ...limited, activationOffloading: true });
  t.ok(taken.peakBytes <= maxMemory);
  const { availableMemory } = process;
  t.teardown(() => Object.assign(process, { availableMemory }));
  process.availableMemory = () => 7 * inputBytes - 1;
  await t.rejects(QLoRATrainer.create(optionsOf(t, { model: modelOf(8), activationOffloading: true })), {
    code: 'ERR_QLORA_MEMORY_PLAN',
    message: /^activationOffloading takes .+ of the host's memory, which has .+ for it$/,
  });
});

t.test('a run goes on with another value', { skip }, async (t) => {
  const options = optionsOf(t, { saveSteps: 1 });
  const whole = await trained(options);
  const begun = { ...options, outputDir: join(t.testdirName, 'begun') };
  await trained({ ...begun, maxSteps: 1 });
  const rest = await trained({ ...begun, activationOffloading: true }, join(begun.outputDir, 'checkpoint-1'));
  t.equal(rest.bits.parameters, whole.bits.parameters);
});

t.test('where there is nothing to move', async (t) => {
  const onCpu = optionsOf(t, { device: 'cpu', activationOffloading: true });
  await t.rejects(QLoRATrainer.create({ ...onCpu, gradientCheckpointing: false }), {
    code: 'ERR_QLORA_OPTION_CONFLICT',
    message: /activationOffloading .* gradientCheckpointing .* must be true or 'auto', and is false/,
  });
  const said: string[] = [];
  setLogger((level, message) => void said.push(`${level}: ${message}`));
  const { memory: taken } = await trained({ ...onCpu, maxSteps: 1 });
  setLogger(null);
  t.match(said, [/^warn: option 'activationOffloading' changes nothing: .* on the CPU$/]);
  t.equal(taken.pinnedPeakBytes, 0);
});
