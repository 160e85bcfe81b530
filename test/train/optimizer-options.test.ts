/** Options of the optimizer and of noise, through QLoRATrainer: each changes what it must, and nothing else. */
import { createHash } from 'node:crypto';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import t, { type Test } from 'tap';
import { QLoRATrainer, QuantizedModel, type TrainEvent, type TrainerOptions } from '../../lib/index.js';
import { hiddenStates } from '../../lib/models/core.js';
import { noiseMagnitudes, noiseStream } from '../../lib/models/neftune.js';
import { optimizerNames } from '../../lib/train/options.js';
import { referencesDir } from '../support/references.js';

const tiny = join(referencesDir('models'), 'llama');
const rowOf = (i: number, length: number) => ({ inputIds: Array.from({ length }, (_, k) => (11 * i + 7 * k) % 200) });
const rows = [rowOf(1, 9), rowOf(2, 14), rowOf(3, 5), rowOf(4, 22)];

function create(t: Test, options: Partial<TrainerOptions> = {}): Promise<QLoRATrainer> {
  return QLoRATrainer.create({
    model: tiny,
    dataset: rows,
    outputDir: join(t.testdirName, 'out'),
    learningRate: 1e-2,
    gradientAccumulationSteps: 2,
    lora: { r: 4 },
    computeDtype: 'f32',
    quantization: 'none',
    ...options,
  });
}

const partsOf = (trainer: QLoRATrainer, part: 'A' | 'B') =>
  Promise.all((trainer.adapter?.layers ?? []).map((layer) => layer.read(part)));

/** Fills every B, so that A's gradients are not zero. */
async function fillB(trainer: QLoRATrainer, size: number): Promise<void> {
  for (const layer of trainer.adapter?.layers ?? [])
    await layer.write(
      'B',
      Float32Array.from({ length: layer.outFeatures * layer.r }, (_, i) => Math.sin(i) * size),
    );
}

async function bitsOf(trainer: QLoRATrainer): Promise<string> {
  const hash = createHash('sha256');
  for (const values of [...(await partsOf(trainer, 'A')), ...(await partsOf(trainer, 'B'))])
    hash.update(new Uint8Array(values.buffer));
  return hash.digest('hex');
}

async function eventsOf(run: AsyncIterable<TrainEvent>): Promise<TrainEvent[]> {
  const events: TrainEvent[] = [];
  for await (const event of run) events.push(event);
  return events;
}

/** Losses of some steps over the same rows, and the adapter after them. */
async function train(
  t: Test,
  options: Partial<TrainerOptions>,
): Promise<{ losses: number[]; norms: number[]; bits: string; evaluated: number }> {
  await using trainer = await create(t, options);
  const { loss: evaluated } = await trainer.evaluate(rows);
  const steps = [];
  for (let i = 0; i < 3; i++) steps.push(await trainer.trainStep(rows));
  const [losses, norms] = [steps.map(({ loss }) => loss), steps.map(({ gradNorm }) => gradNorm)];
  return { losses, norms, bits: await bitsOf(trainer), evaluated };
}

t.test('every optimizer learns, and each in its own way', async (t) => {
  const bits = new Map<string, string>();
  const rates: Partial<Record<string, number>> = { sgd: 1, lion_32bit: 1e-3, lion_8bit: 1e-3 };
  const several: [string, Partial<TrainerOptions>][] = [
    ...optimizerNames.map((optimizer): [string, Partial<TrainerOptions>] => [
      optimizer,
      { optimizer, learningRate: rates[optimizer] ?? 1e-2 },
    ]),
    ['momentum', { optimizer: 'sgd', learningRate: 1, momentum: 0.5 }],
    ['alpha', { optimizer: 'ademamix', ademamix: { alpha: 50 } }],
    ['beta3', { optimizer: 'ademamix', ademamix: { beta3: 0.91 } }],
    ['horizon', { optimizer: 'ademamix', maxSteps: 2 }],
    ['beta1', { adamBeta1: 0.5 }],
    ['beta2', { adamBeta2: 0.5 }],
    ['epsilon', { adamEpsilon: 1e-2 }],
    ['decay', { weightDecay: 0.1 }],
  ];
  for (const [what, options] of several) {
    // Layers of 4096 and more parameters, so that 8 bits are 8 bits.
    const result = await train(t, { lora: { r: 64 }, maxSteps: 20, ...options });
    t.ok((result.losses[2] as number) < (result.losses[0] as number), `${what}: ${result.losses}`);
    bits.set(what, result.bits);
  }
  t.equal(bits.get('paged_adamw_32bit'), bits.get('adamw_32bit'), 'paging changes no bit');
  t.equal(bits.get('paged_adamw_8bit'), bits.get('adamw_8bit'));
  t.equal(new Set(bits.values()).size, several.length - 2, 'all others differ');
});

t.test('LoRA+ multiplies the rate of B alone', async (t) => {
  const moves = [];
  for (const loraPlusRatio of [1, 8]) {
    await using trainer = await create(t, { optimizer: 'sgd', loraPlusRatio, lora: { r: 4, useDora: true } });
    await fillB(trainer, 0.05);
    const before = { A: await partsOf(trainer, 'A'), B: await partsOf(trainer, 'B') };
    const { gradNorm } = await trainer.trainStep(rows);
    const after = { A: await partsOf(trainer, 'A'), B: await partsOf(trainer, 'B') };
    const moved = (part: 'A' | 'B') =>
      Math.sqrt(
        after[part].reduce(
          (s, x, i) => s + x.reduce((q, v, k) => q + (v - (before[part][i]?.[k] as number)) ** 2, 0),
          0,
        ),
      );
    moves.push({ gradNorm, A: moved('A'), B: moved('B') });
  }
  const [one, eight] = moves as [(typeof moves)[0], (typeof moves)[0]];
  t.ok(one.A > 0 && one.B > 0);
  t.equal(eight.gradNorm, one.gradNorm);
  t.equal(eight.A, one.A);
  t.ok(Math.abs(eight.B / one.B - 8) < 1e-3, `B moves 8 times as far: ${eight.B / one.B}`);
});

t.test('NEFTune: noise while training only, a function of the seed', async (t) => {
  const without = await train(t, {});
  const noisy = await train(t, { neftuneNoiseAlpha: 5 });
  t.not(noisy.losses[0], without.losses[0]);
  t.ok(Math.abs((noisy.losses[0] as number) - (without.losses[0] as number)) < 1, 'noise, not another model');
  t.equal(noisy.evaluated, without.evaluated, 'evaluate() has none');
  t.same(await train(t, { neftuneNoiseAlpha: 5 }), noisy, 'the same seed, the same bits');
  t.same(
    await train(t, { neftuneNoiseAlpha: 5, gradientCheckpointing: false }),
    noisy,
    'with and without checkpointing',
  );
  t.not((await train(t, { neftuneNoiseAlpha: 5, seed: 43 })).losses[0], noisy.losses[0]);
  const louder = await train(t, { neftuneNoiseAlpha: 50 });
  const change = (x: typeof noisy) => Math.abs((x.losses[0] as number) - (without.losses[0] as number));
  t.ok(change(louder) > change(noisy), 'alpha is its size');
});

t.test('NEFTune: a row has the noise of its own tokens, padded or packed', async (t) => {
  const segmentIds = Int32Array.of(0, 0, 0, 1, 1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0);
  const [three, two, eight] = [3, 2, 8].map((n) => Math.fround(5 / Math.sqrt(n * 64))) as [number, number, number];
  t.same(
    [...noiseMagnitudes(5, 64, { batch: 2, length: 8, segmentIds })],
    [three, three, three, two, two, 0, 0, 0, ...new Array(8).fill(eight)],
  );
  t.same([...noiseMagnitudes(5, 64, { batch: 2, length: 3 })], new Array(6).fill(three));
  t.equal(new Set([0, 1, 2 ** 20].map(noiseStream)).size, 3);

  await using model = await QuantizedModel.load(tiny, { computeDtype: 'f32', quantization: 'none' });
  const pass = { adapter: undefined, checkpointing: 'none' as const, neftune: { alpha: 50, seed: 7, microStep: 3 } };
  const hidden = async (tokens: number[], batch: number, ids?: Int32Array, neftune = true) => {
    const length = tokens.length / batch;
    const rows = { tokens: Int32Array.from(tokens), batch, length, segmentIds: ids };
    using h = hiddenStates(model.core, undefined, rows, { ...pass, neftune: neftune ? pass.neftune : undefined });
    return h.read();
  };
  const alone = await hidden([5, 6, 7], 1);
  const padded = await hidden([5, 6, 7, 0, 0, 1, 2, 3, 4, 5], 2, Int32Array.of(0, 0, 0, -1, -1, 0, 0, 0, 0, 0));
  const quiet = await hidden([5, 6, 7], 1, undefined, false);
  const apart = (a: Float32Array, b: Float32Array) =>
    a.reduce((most, x, i) => Math.max(most, Math.abs(x - (b[i] as number))), 0);
  t.ok(apart(alone, padded) < 1e-4, `padding changes nothing: ${apart(alone, padded)}`);
  t.ok(apart(alone, quiet) > 1e-2, 'there is noise');
});

t.test("f16's loss is scaled: an overflow halves the scale, and the run goes on", async (t) => {
  const f32 = await train(t, {});
  const f16 = await train(t, { computeDtype: 'f16' });
  f16.norms.forEach((norm, i) => {
    t.ok(Math.abs(norm / (f32.norms[i] as number) - 1) < 0.01, `unscaled: ${norm} and ${f32.norms[i]}`);
  });
  t.ok((f16.losses[2] as number) < (f16.losses[0] as number));
  await using trainer = await create(t, { computeDtype: 'f16', learningRate: 1e-3, maxSteps: 8 });
  // B so large that 2^16 times the gradient of the first step is beyond f16, and one of a later scale is not.
  await fillB(trainer, 1);
  const before = await bitsOf(trainer);
  const first = trainer.train();
  const events: TrainEvent[] = [];
  for await (const event of first) events.push(event);
  const warnings = events.filter((e) => e.type === 'warning');
  t.ok(warnings.length > 0 && warnings.length < 5, `${warnings.length} warnings`);
  for (const [i, warning] of warnings.entries()) {
    t.match(warning, {
      code: 'LOSS_SCALE',
      message: new RegExp(`scaled by ${2 ** 16 / 2 ** i}: .*is ${2 ** 15 / 2 ** i} now`),
    });
  }
  const steps = events.filter((e) => e.type === 'step');
  t.equal(steps.length, 8);
  t.ok(Number.isFinite(steps.at(-1)?.gradNorm));
  t.not(await bitsOf(trainer), before, 'it learns again');
});

t.test('a run goes on from a checkpoint with all that the optimizer holds', async (t) => {
  const kinds: Partial<TrainerOptions>[] = [
    { optimizer: 'paged_adamw_8bit', lora: { r: 64 }, neftuneNoiseAlpha: 5, loraPlusRatio: 4 },
    { optimizer: 'ademamix', computeDtype: 'f16' },
  ];
  for (const kind of kinds) {
    const options = { ...kind, maxSteps: 6, saveSteps: 3, outputDir: t.testdir({}) };
    const run = async (resume: string | false) => {
      await using trainer = await create(t, options);
      // The first steps of f16 overflow.
      if (kind.computeDtype) await fillB(trainer, 1);
      await trainer.train({ resume });
      return await bitsOf(trainer);
    };
    const undisturbed = await run(false);
    t.equal(await run(join(options.outputDir, 'checkpoint-3')), undisturbed, `${kind.optimizer}`);
  }
});

t.test('overflows do not end a run, however many come in a row', async (t) => {
  const outputDir = t.testdir({});
  const options = { computeDtype: 'f16', maxSteps: 22, saveSteps: 2, outputDir } as const;
  {
    await using trainer = await create(t, { ...options, maxSteps: 2 });
    await trainer.train();
  }
  // As if it had found no gradient too large for a long time.
  const folder = join(outputDir, 'checkpoint-2');
  const path = join(folder, 'optimizer.safetensors');
  const bytes = readFileSync(path);
  const headerLength = Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.toString('utf8', 8, 8 + headerLength));
  const before = createHash('sha256').update(bytes).digest('hex');
  bytes.writeFloatLE(2 ** 34, 8 + headerLength + header.loss_scale.data_offsets[0]);
  writeFileSync(path, bytes);
  const manifest = readFileSync(join(folder, 'manifest.json'), 'utf8');
  t.match(manifest, before);
  writeFileSync(
    join(folder, 'manifest.json'),
    manifest.replace(before, createHash('sha256').update(bytes).digest('hex')),
  );
  await using trainer = await create(t, options);
  const run = trainer.train({ resume: folder });
  const codes = (await eventsOf(run)).flatMap((e) => (e.type === 'warning' ? [e.code] : []));
  const overflows = codes.filter((code) => code === 'LOSS_SCALE').length;
  t.ok(overflows > 5 && overflows < 20, `${overflows} overflows: ${codes}`);
  t.notOk(codes.includes('NON_FINITE_GRADIENT'));
  t.equal((await run).steps, 22);
});

t.test('gradients that overflow whatever the scale end the run', async (t) => {
  await using trainer = await create(t, { computeDtype: 'f16', maxSteps: 40 });
  await fillB(trainer, 1000);
  const events: TrainEvent[] = [];
  await t.rejects(
    (async () => {
      for await (const event of trainer.train()) events.push(event);
    })(),
    { code: 'ERR_QLORA_DIVERGED' },
  );
  const codes = events.flatMap((e) => (e.type === 'warning' ? [e.code] : []));
  t.same(codes.slice(-5), new Array(5).fill('NON_FINITE_GRADIENT'));
});

t.test('other types have no loss scale', async (t) => {
  await using trainer = await create(t, { computeDtype: 'bf16', maxSteps: 2 });
  const events = await eventsOf(trainer.train());
  t.notOk(events.some((e) => e.type === 'warning'));
});
