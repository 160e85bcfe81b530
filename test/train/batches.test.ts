/** What a step consists of: order, groups of like length, packed sequences. */
import { cpSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import t, { type Test } from 'tap';
import { Tape } from '../../lib/autograd.js';
import { collate, shiftLabels } from '../../lib/data/batch.js';
import { lengthGroupedOrder, shuffledOrder } from '../../lib/data/order.js';
import { MemoryRows } from '../../lib/data/row-store.js';
import { packRows } from '../../lib/data/sequences.js';
import { QLoRATrainer, QuantizedModel, type TrainerOptions } from '../../lib/index.js';
import { decoderOf, hiddenStates } from '../../lib/models/core.js';
import { zeros } from '../../lib/ops/elementwise.js';
import { linearCrossEntropy } from '../../lib/ops/linear-cross-entropy.js';
import { randomUniform } from '../../lib/ops/random.js';
import { Tensor } from '../../lib/tensor.js';
import { enqueueLoss } from '../../lib/train/micro-step.js';
import { resolveTrainerOptions } from '../../lib/train/options.js';
import { StepPlan } from '../../lib/train/step-plan.js';
import { referencesDir } from '../support/references.js';

const tiny = join(referencesDir('models'), 'llama');

const encoded = (length: number, first = 0) => {
  const ids = Int32Array.from({ length }, (_, k) => (first + 7 * k) % 200);
  return { ids, labels: ids, truncated: 0, cut: { source: 0, target: 0 } };
};
/** Lengths without a pattern, from 1 to 60. */
const lengthsOf = (count: number) => Int32Array.from({ length: count }, (_, i) => 1 + ((i * i * 31 + 17 * i) % 60));
const storeOf = (lengths: Iterable<number>) => new MemoryRows(Array.from(lengths, (n, i) => encoded(n, i)));
const optionsOf = (options: Partial<TrainerOptions>) =>
  resolveTrainerOptions({ model: tiny, dataset: [], outputDir: 'out', ...options });
const ascending = (numbers: Iterable<number>) => [...numbers].sort((a, b) => a - b);

t.test('groups of like length: sorted stretches of a shuffled order, the longest row first', async (t) => {
  for (const [count, size, steps] of [
    [1000, 16, 15],
    [1000, 4, 50],
    [30, 16, 1],
    [5, 1, 1],
    [1, 4, 1],
    [0, 4, 1],
  ] as const) {
    const lengths = lengthsOf(count);
    const order = await lengthGroupedOrder(lengths, size, 42, 0);
    t.same(ascending(order), [...lengths.keys()], `${count} rows: each once`);
    t.same([...(await lengthGroupedOrder(lengths, size, 42, 0))], [...order]);
    const at = (place: number) => lengths[order[place] as number] as number;
    if (count > 0) t.equal(at(0), Math.max(...lengths), 'the longest is in the first step');
    const stretch = size * steps;
    const shuffled = shuffledOrder(count, 42, 0);
    for (let begin = 0; begin < count; begin += stretch) {
      const places = Array.from(order.subarray(begin, begin + stretch), (_, i) => at(begin + i));
      t.same(places, ascending(places).reverse(), `stretch at ${begin}: the longest first`);
      const before = new Set(shuffled.subarray(begin, begin + stretch));
      const moved = order.subarray(begin, begin + stretch).filter((i) => !before.has(i));
      t.ok(moved.length <= 1, 'a stretch has the rows that the shuffle gave it, but for the longest of all');
    }
    if (count > 30) {
      t.notSame([...(await lengthGroupedOrder(lengths, size, 42, 1))], [...order], 'each epoch has its own');
      t.notSame([...(await lengthGroupedOrder(lengths, size, 43, 0))], [...order]);
    }
  }
});

t.test('packing: each row once, nothing cut, little left empty', async (t) => {
  const rows = storeOf([...lengthsOf(3000), 150]);
  const packed = await packRows(rows, 128, 7);
  const all = Array.from({ length: packed.count }, (_, i) => packed.rowsOf(i));
  t.same(ascending(all.flatMap((r) => [...r])), [...Array(3001).keys()]);
  let tokens = 0;
  for (const [i, numbers] of all.entries()) {
    const length = numbers.reduce((n, row) => n + rows.tokens(row), 0);
    t.equal(packed.tokens[i], length);
    t.equal(packed.targets[i], length - numbers.length, 'the first token of a row is no target');
    if (length > 128) t.same([...numbers], [3000], 'a row that is longer stands alone');
    tokens += length;
  }
  t.ok(tokens / (packed.count * 128) > 0.96, `filled to ${((100 * tokens) / (packed.count * 128)).toFixed(1)} %`);
  const again = await packRows(rows, 128, 7);
  t.same([...again.rowsOf(5)], [...packed.rowsOf(5)], 'seeded');
  t.notSame([...(await packRows(rows, 128, 8)).rowsOf(5)], [...packed.rowsOf(5)]);
});

t.test('a packed batch: segments, positions, labels', async (t) => {
  const [a, b, c] = [encoded(3, 10), encoded(2, 50), encoded(4, 90)] as const;
  const batch = collate([[a, b], [c]], { padId: 9 });
  t.match(batch, { batch: 2, length: 5 });
  t.same([...batch.tokens], [10, 17, 24, 50, 57, 90, 97, 104, 111, 9]);
  t.same([...batch.positions], [0, 1, 2, 0, 1, 0, 1, 2, 3, 0]);
  t.same([...batch.segmentIds], [0, 0, 0, 1, 1, 0, 0, 0, 0, -1]);
  t.same([...shiftLabels(batch)], [17, 24, -100, 57, -100, 97, 104, 111, -100, -100]);
});

t.test('the plan of a step is a function of its number', async (t) => {
  const rows = storeOf(lengthsOf(203));
  for (const options of [{}, { groupByLength: false }, { packing: true, maxLength: 64 }]) {
    const resolved = optionsOf({ batchSize: 4, gradientAccumulationSteps: 2, epochs: 2.5, ...options });
    const plan = await StepPlan.create(rows, resolved);
    const name = JSON.stringify(options);
    t.equal(plan.stepsPerEpoch, Math.ceil(plan.sequences.count / 8), name);
    t.equal(plan.totalSteps, Math.ceil(2.5 * plan.stepsPerEpoch));
    const steps: number[][] = [];
    for (let step = 0; step < plan.totalSteps; step++) {
      const sequences = await plan.load(await plan.sequencesOf(step));
      steps.push(sequences.flat().map(({ ids }) => rows.count + ids.length * 1000 + (ids[0] as number)));
    }
    for (const epoch of [0, 1]) {
      const seen = steps.slice(epoch * plan.stepsPerEpoch, (epoch + 1) * plan.stepsPerEpoch).flat();
      t.equal(seen.length, rows.count, `epoch ${epoch}: every row`);
      t.equal(new Set(seen).size, new Set(steps.slice(0, plan.stepsPerEpoch).flat()).size);
    }
    t.equal(
      (await plan.sequencesOf(plan.stepsPerEpoch - 1)).length,
      plan.sequences.count % 8 || 8,
      'a short last step',
    );
    t.notSame(steps[0], steps[plan.stepsPerEpoch], 'each epoch has an order of its own');
    // As a resumed run asks: another plan, any step, in any order.
    const resumed = await StepPlan.create(rows, resolved);
    for (const step of [plan.totalSteps - 1, 3, plan.stepsPerEpoch]) {
      t.same([...(await resumed.sequencesOf(step))], [...(await plan.sequencesOf(step))], `${name}: step ${step}`);
    }
  }
  const padding = async (groupByLength: boolean) => {
    const plan = await StepPlan.create(rows, optionsOf({ gradientAccumulationSteps: 8, groupByLength }));
    let spread = 0;
    for (let step = 0; step < plan.stepsPerEpoch; step++) {
      const lengths = [...(await plan.sequencesOf(step))].map((i) => plan.sequences.tokens[i] as number);
      spread += Math.max(...lengths) - Math.min(...lengths);
    }
    return spread;
  };
  t.ok((await padding(true)) < 0.4 * (await padding(false)), 'rows of a step are of like length');
});

/** Loss, gradient norm, and the adapter after steps of plain gradient descent, which holds the gradients. */
async function descend(t: Test, options: Partial<TrainerOptions>) {
  const lengths = [9, 14, 5, 22, 3, 2, 17, 30];
  const rows = lengths.map((length, i) => ({
    inputIds: [...encoded(length, 13 * i).ids],
    labels: [...encoded(length, 13 * i).ids].map((id, k) => (i % 2 && k < 4 && length > 6 ? -100 : id)),
  }));
  await using trainer = await QLoRATrainer.create({
    model: tiny,
    dataset: rows,
    outputDir: join(t.testdirName, 'out'),
    computeDtype: 'f32',
    quantization: 'none',
    optimizer: 'sgd',
    learningRate: 0.5,
    maxGradNorm: 0,
    lora: { r: 4 },
    ...options,
  });
  const steps = [await trainer.trainStep(rows), await trainer.trainStep(rows)];
  const layers = trainer.adapter?.layers ?? [];
  const adapter = await Promise.all(layers.flatMap((layer) => [layer.read('A'), layer.read('B')]));
  return { steps, adapter };
}

t.test('packed rows have the loss and the gradients of rows by themselves', async (t) => {
  const dynamic = t.testdir();
  cpSync(tiny, dynamic, { recursive: true });
  const config = JSON.parse(readFileSync(join(tiny, 'config.json'), 'utf8'));
  Object.assign(config, { rope_scaling: { type: 'dynamic', factor: 4 }, max_position_embeddings: 8 });
  writeFileSync(join(dynamic, 'config.json'), JSON.stringify(config));
  for (const [name, model] of [
    ['rope', tiny],
    ['rope that depends on the length of the row', dynamic],
  ] as const) {
    const apart = await descend(t, { model, batchSize: 1 });
    for (const [what, options] of Object.entries({
      'rows side by side': { batchSize: 3 },
      'all in one sequence': { packing: true, maxLength: 100 },
      'sequences one by one': { packing: true, maxLength: 40 },
      'sequences side by side': { packing: true, maxLength: 33, batchSize: 2 },
      'packed, all layers kept': { packing: true, maxLength: 40, gradientCheckpointing: false },
    } satisfies Record<string, Partial<TrainerOptions>>)) {
      const other = await descend(t, { model, ...options });
      for (const [i, { loss, gradNorm }] of apart.steps.entries()) {
        const got = other.steps[i] as (typeof apart.steps)[0];
        t.ok(Math.abs(got.loss - loss) < 2e-6 * loss, `${name}, ${what}: loss ${got.loss} and ${loss}`);
        t.ok(Math.abs(got.gradNorm - gradNorm) < 2e-5 * gradNorm, `${name}, ${what}: ${got.gradNorm} and ${gradNorm}`);
      }
      let worst = 0;
      for (const [i, values] of other.adapter.entries()) {
        for (const [k, v] of values.entries()) worst = Math.max(worst, Math.abs(v - (apart.adapter[i]?.[k] as number)));
      }
      t.ok(worst < 2e-6, `${name}, ${what}: A and B within ${worst}`);
    }
  }
});

t.test('where few labels count, the last layer is spared the rest: loss and gradients stay', async (t) => {
  await using model = await QuantizedModel.load(tiny, { quantization: 'none', computeDtype: 'f32' });
  const { core } = model;
  const adapter = model.addLora('a', { r: 4 });
  for (const [i, { A, B }] of adapter.layers.entries()) {
    for (const p of [A, B]) p.requiresGrad = true;
    randomUniform(B, -0.1, 0.1, 5, i);
  }
  const sequences = [11, 23, 40].map((length, b) => {
    const row = encoded(length, 17 * b);
    return [{ ...row, labels: row.ids.map((id, k) => (k < length - 1 - 3 * b ? -100 : id)) }];
  });
  const gradients = async (loss: (tape: Tape) => Tensor) => {
    const parameters = adapter.layers.flatMap(({ A, B }) => [A, B]);
    for (const p of parameters) p.gradient = zeros(core.stream, p.shape, 'f32');
    using value = loss(new Tape());
    const all = await Promise.all(parameters.map((p) => (p.gradient as Tensor).read()));
    return { loss: (await value.read())[0] as number, all };
  };
  for (const checkpointing of ['none', 'blocks'] as const) {
    const pass = { adapter: 'a', checkpointing };
    await core.stream.usage();
    const spared = await gradients((tape) => enqueueLoss(core, tape, sequences, 0.1, pass));
    const { operations } = await core.stream.usage();
    t.equal(
      operations.selectRows?.calls,
      checkpointing === 'none' ? 2 : 4,
      'what goes into the last layer, and what it attends to',
    );
    const whole = await gradients((tape) => {
      const batch = collate(sequences);
      const { tokens, batch: B, length, positions, segmentIds } = batch;
      const rows = { tokens, batch: B, length, positions, segmentIds };
      using hidden = hiddenStates(core, tape, rows, pass);
      using labels = Tensor.from(core.stream, shiftLabels(batch), [B * length]);
      const loss = linearCrossEntropy(tape, hidden, decoderOf(core, 'a').head, labels, { scale: 0.1 });
      using one = Tensor.from(core.stream, Float32Array.of(1), [1]);
      tape.backward(loss, one);
      return loss;
    });
    t.ok(Math.abs(spared.loss - whole.loss) < 1e-6 * whole.loss, `loss ${spared.loss} and ${whole.loss}`);
    for (const [i, values] of whole.all.entries()) {
      const size = Math.max(...values.map(Math.abs));
      const worst = Math.max(...values.map((v, k) => Math.abs(v - (spared.all[i]?.[k] as number))));
      t.ok(size > 0 && worst < 1e-5 * size, `gradient ${i}: within ${worst} of ${size}`);
    }
  }
  const none = sequences.map((sequence) => sequence.map((row) => ({ ...row, labels: row.ids.map(() => -100) })));
  const { loss, all } = await gradients((tape) =>
    enqueueLoss(core, tape, none, 0.1, { adapter: 'a', checkpointing: 'none' }),
  );
  t.equal(loss, 0, 'no label counts');
  t.ok(all.every((values) => values.every((v) => v === 0)));
});

t.test('a run over packed rows, from an epoch to its end', async (t) => {
  const rows = Array.from(lengthsOf(60), (length, i) => ({ inputIds: [...encoded(length + 1, i).ids] }));
  const options: TrainerOptions = {
    model: tiny,
    dataset: rows,
    evalDataset: 5,
    outputDir: join(t.testdirName, 'out'),
    packing: true,
    maxLength: 64,
    gradientAccumulationSteps: 4,
    epochs: 2,
    lora: { r: 4 },
    learningRate: 1e-2,
  };
  const run = async () => {
    await using trainer = await QLoRATrainer.create(options);
    const losses: number[] = [];
    for await (const event of trainer.train()) if (event.type === 'step') losses.push(event.loss);
    return losses;
  };
  const losses = await run();
  t.ok((losses.at(-1) as number) < (losses[0] as number), `the loss falls: ${losses[0]} to ${losses.at(-1)}`);
  t.same(await run(), losses, 'and again the same');
});
