/** Modules that an adapter trains whole, and adapters that start from singular values. */
import { join } from 'node:path';
import t from 'tap';
import { Tape } from '../../lib/autograd.js';
import { QLoRATrainer, QuantizedModel } from '../../lib/index.js';
import { decoderOf, FrozenAdapter, hiddenStates } from '../../lib/models/core.js';
import type { Linear } from '../../lib/nn/linear.js';
import { fill, zeros } from '../../lib/ops/elementwise.js';
import { linearCrossEntropy } from '../../lib/ops/linear-cross-entropy.js';
import { addProduct } from '../../lib/ops/low-rank.js';
import { dequantizeWeight } from '../../lib/ops/quantize.js';
import { randomUniform } from '../../lib/ops/random.js';
import type { Weight } from '../../lib/ops/weight.js';
import { Tensor } from '../../lib/tensor.js';
import { largestError } from '../support/op-harness.js';
import { packageRoot, readJson, referencesDir } from '../support/references.js';
import { readSafetensors, type StoredTensor, valuesOf } from '../support/safetensors.js';

const whole = join(referencesDir('models'), 'llama-whole');
const demo = join(packageRoot(), 'examples', 'demo', 'model');
const plain = { computeDtype: 'f32', quantization: 'none' } as const;
const stored = readSafetensors(join(whole, 'expected.safetensors'));
const reference = (key: string) => valuesOf(stored.get(key) as StoredTensor);
const ids = Array.from((stored.get('input_ids') as StoredTensor).data as Int32Array);

t.test('QuantizedModel: the logits, losses and texts of transformers and PEFT', async (t) => {
  const folder = join(referencesDir('models'), 'llama');
  const results = readSafetensors(join(folder, 'expected.safetensors'));
  const { sequences, loss, greedy } = readJson<{
    sequences: { input_ids: number[]; labels: number[] }[];
    loss: Record<string, number>;
    greedy: { prompt: number[]; base: number[]; adapter: number[] };
  }>(folder, 'expected.json');
  const check = async (model: QuantizedModel, of: string, i: number, adapter?: null) => {
    const want = valuesOf(results.get(`${of}.logits.${i}`) as StoredTensor);
    const got = await model.logits(sequences[i]?.input_ids as number[], { adapter });
    t.ok(largestError(got, want, 1) < 2e-4, `${of}: logits`);
    let [sum, targets] = [0, 0];
    for (const { input_ids, labels } of sequences) {
      const counted = labels.slice(1).filter((label) => label !== -100).length;
      sum += counted * (await model.loss(input_ids, labels, { adapter }));
      targets += counted;
    }
    t.ok(Math.abs(sum / targets - (loss[of] as number)) < 1e-4, `${of}: loss`);
  };
  const options = { maxNewTokens: 24, ignoreEos: true };
  await using model = await QuantizedModel.load(folder, plain);
  await check(model, 'base', 0);
  t.same(await model.generateTokens(greedy.prompt, options), greedy.base);
  await model.loadLora('a', join(folder, 'adapter'));
  await check(model, 'adapter', 1);
  await check(model, 'base', 1, null);
  t.same(await model.generateTokens(greedy.prompt, options), greedy.adapter);
  await using quantized = await QuantizedModel.load(folder, { computeDtype: 'f32' });
  await check(quantized, 'nf4', 0);
});

t.test('modules trained whole: the logits, the loss and the gradients of PEFT', async (t) => {
  await using model = await QuantizedModel.load(whole, plain);
  const adapter = await model.loadLora('a', join(whole, 'adapter'));
  t.ok(largestError(await model.logits(ids), reference('logits'), 1) < 1e-4);
  t.ok(
    largestError(await model.logits(ids, { adapter: null }), reference('base.logits'), 1) < 1e-4,
    'the base is as it was',
  );
  const [loss] = reference('loss');
  t.ok(Math.abs((await model.loss(ids)) - (loss as number)) < 1e-5);
  const lengths = adapter.parameters.map(({ size }) => size);
  t.equal(
    adapter.trainableParameters,
    lengths.reduce((a, b) => a + b),
  );
  t.notOk(
    adapter.layers.some(({ path }) => path.endsWith('v_proj')),
    'what is trained whole has no A and B',
  );

  const { core } = model;
  for (const checkpointing of ['none', 'blocks'] as const) {
    for (const p of adapter.parameters) {
      p.requiresGrad = true;
      p.gradient = zeros(core.stream, p.shape, 'f32', 'optimizer');
    }
    const tape = new Tape();
    const rows = { tokens: Int32Array.from(ids), batch: 1, length: ids.length };
    using hidden = hiddenStates(core, tape, rows, { adapter: 'a', checkpointing });
    using labels = Tensor.from(
      core.stream,
      Int32Array.from(ids, (_, i) => ids[i + 1] ?? -100),
      [ids.length],
    );
    const { head } = decoderOf(core, 'a');
    using out = linearCrossEntropy(tape, hidden, head, labels, { scale: 1 / (ids.length - 1) });
    using one = new Tensor(core.stream, 'f32', [1]);
    fill(one, 1);
    tape.backward(out, one);
    const gradients = new Map<string, Tensor>();
    for (const layer of adapter.layers) {
      gradients.set(`${layer.path}.lora_A.weight`, layer.A.gradient as Tensor);
      gradients.set(`${layer.path}.lora_B.weight`, layer.B.gradient as Tensor);
    }
    for (const [name, tensor] of adapter.whole.tensors) gradients.set(name, tensor.gradient as Tensor);
    t.equal(gradients.size, [...stored.keys()].filter((key) => key.startsWith('grad.')).length);
    for (const [name, gradient] of gradients) {
      const want = reference(`grad.base_model.model.${name}`);
      const most = want.reduce((m, x) => Math.max(m, Math.abs(x)), 0);
      const error = largestError(await gradient.read(), want, most);
      if (!(error < 2e-4)) t.fail(`${name}, checkpointing ${checkpointing}: ${error}`);
      gradient.dispose();
    }
    for (const p of adapter.parameters) {
      p.requiresGrad = false;
      p.gradient = undefined;
    }
  }
});

t.test('modules trained whole are saved as PEFT saves them', async (t) => {
  const folder = t.testdir({});
  await using model = await QuantizedModel.load(whole, plain);
  const theirs = await model.loadLora('theirs', join(whole, 'adapter'));
  await theirs.save(join(folder, 'copy'));
  const [got, want] = ['copy/', `${join(whole, 'adapter')}/`].map((path) =>
    readSafetensors(
      path.startsWith('/') ? `${path}adapter_model.safetensors` : join(folder, path, 'adapter_model.safetensors'),
    ),
  ) as [Map<string, StoredTensor>, Map<string, StoredTensor>];
  t.same([...got.keys()], [...want.keys()]);
  for (const [key, tensor] of want) t.same(got.get(key), tensor, key);
  t.same(readJson(folder, 'copy', 'adapter_config.json'), {
    ...readJson<object>(whole, 'adapter', 'adapter_config.json'),
  });

  // Each adapter has its own, and the base has neither.
  const base = await model.logits(ids, { adapter: null });
  const own = model.addLora('own', { r: 2, modulesToSave: ['lm_head', 'embed_tokens'] });
  t.ok(largestError(await model.logits(ids, { adapter: 'own' }), base, 1) < 1e-5, 'a fresh copy changes nothing');
  fill(own.whole.tensors.get('lm_head.weight') as Tensor, 0);
  t.ok((await model.logits(ids, { adapter: 'own' })).every((x) => x === 0));
  t.same(await model.logits(ids, { adapter: null }), base);
  t.ok(largestError(await model.logits(ids, { adapter: 'theirs' }), reference('logits'), 1) < 1e-4);
  const before = model.memory().byClass.adapters as number;
  model.removeLora('own');
  await model.core.stream.sync();
  t.ok((model.memory().byClass.adapters as number) < before - 2 * 4 * 67 * 32 + 1, 'freed');
  t.throws(() => model.addLora('x', { modulesToSave: ['embed_tokens', 'nonsense'] }), {
    code: 'ERR_QLORA_ADAPTER_TARGETS',
    message: /'nonsense'/,
    hint: /embed_tokens.*lm_head/,
  });
  t.notOk(model.adapters.has('x'));

  // Merged, the tie is broken where one was trained alone.
  const { logitDrift } = await model.merge(join(folder, 'merged'), { adapter: 'theirs' });
  t.ok(logitDrift < 1e-4, `drift ${logitDrift}`);
  await using merged = await QuantizedModel.load(join(folder, 'merged'), plain);
  t.equal(merged.config.tie_word_embeddings, false);
  t.ok(largestError(await merged.logits(ids), reference('logits'), 1) < 1e-4);
  const embeddings = model.addLora('embeddings', { r: 2, modulesToSave: ['embed_tokens'] });
  fill(embeddings.whole.tensors.get('model.embed_tokens.weight') as Tensor, 0.5);
  t.ok((await model.merge(join(folder, 'again'), { adapter: 'embeddings' })).logitDrift < 1e-4);
});

t.test('embeddings, head, norms and a 4-bit layer are trained whole', async (t) => {
  const outputDir = t.testdir({});
  const modules = ['embed_tokens', 'lm_head', 'norm', 'o_proj'];
  await using trainer = await QLoRATrainer.create({
    model: demo,
    dataset: Array.from({ length: 8 }, (_, i) => ({ text: `What is ${i} plus 2? ${i + 2}` })),
    outputDir,
    lora: { r: 2, targetModules: ['q_proj'], modulesToSave: modules },
    learningRate: 1e-3,
    gradientAccumulationSteps: 2,
    maxSteps: 6,
  });
  const { model, adapter } = trainer;
  const at = Array.from({ length: 20 }, (_, i) => i + 3);
  const base = await model.logits(at, { adapter: null });
  const fresh = await Promise.all([...(adapter?.whole.tensors ?? [])].map(([, tensor]) => tensor.read()));
  const losses: number[] = [];
  for await (const event of trainer.train()) if (event.type === 'step') losses.push(event.loss);
  t.ok((losses.at(-1) as number) < (losses[0] as number), String(losses));
  let i = 0;
  for (const [name, tensor] of adapter?.whole.tensors ?? []) {
    const before = fresh[i++] as Float32Array;
    t.ok(
      (await tensor.read()).some((x, j) => x !== before[j]),
      `${name} changed`,
    );
  }
  t.same(await model.logits(at, { adapter: null }), base, 'the base did not');
  t.same(readJson<{ modules_to_save: string[] }>(outputDir, 'adapter_config.json').modules_to_save, modules);

  await using again = await QuantizedModel.load(demo);
  await again.loadLora('a', outputDir);
  t.same(await again.logits(at), await model.logits(at), 'saved and loaded: the same bits');
  const options = { maxNewTokens: 5 };
  t.same(await again.generateTokens(at, options), await model.generateTokens(at, options));
});

t.test('PiSSA', async (t) => {
  const folder = t.testdir({});
  const at = Array.from({ length: 40 }, (_, i) => (i * 7) % 90);
  const f32 = { computeDtype: 'f32' } as const;
  await using exact = await QuantizedModel.load(demo, { ...f32, quantization: 'none' });
  const want = await exact.logits(at);
  await using model = await QuantizedModel.load(demo, f32);
  const base = await model.logits(at);
  const adapter = model.addLora('a', { r: 16, init: 'pissa' });
  t.same(await model.logits(at, { adapter: null }), base, 'the base is as it was');
  const distance = (x: Float32Array) => Math.sqrt(x.reduce((sum, v, i) => sum + (v - (want[i] as number)) ** 2, 0));
  const [started, quantized] = [distance(await model.logits(at)), distance(base)];
  t.ok(started < quantized, `logits at the start are off by ${started}, in plain NF4 by ${quantized}`);
  for (const layer of adapter.layers) {
    const linear = exact.core.weights.linears.find(({ path }) => path === layer.path);
    const own = model.core.weights.linears.find(({ path }) => path === layer.path);
    using whole = dequantizeWeight((linear as Linear).weight, 'f32');
    using plainNf4 = dequantizeWeight((own as Linear).weight, 'f32');
    using rest = dequantizeWeight(layer.residual as Weight, 'f32');
    addProduct(rest, layer.B, layer.A, layer.scale);
    const W = await whole.read();
    const error = (x: Float32Array) => x.reduce((sum, v, i) => sum + (v - (W[i] as number)) ** 2, 0);
    const [pissa, nf4] = [error(await rest.read()), error(await plainNf4.read())];
    if (!(pissa < nf4)) t.fail(`${layer.path}: ${pissa}, in plain NF4 ${nf4}`);
  }
  // Fresh, what it saves changes nothing of the whole weights.
  await adapter.save(join(folder, 'fresh'));
  await exact.loadLora('fresh', join(folder, 'fresh'));
  t.ok(largestError(await exact.logits(at), want, 1) < 1e-3);
  const { logitDrift } = await model.merge(join(folder, 'merged'), { adapter: 'a' });
  t.ok(logitDrift < 0.2, `drift ${logitDrift}`);
  t.throws(() => model.addLora('x', { init: 'pissa', useDora: true }), { code: 'ERR_QLORA_OPTION_CONFLICT' });
});

t.test('what generation freezes of an adapter computes the same bits', async (t) => {
  for (const computeDtype of ['bf16', 'f32', 'f16'] as const) {
    await using model = await QuantizedModel.load(whole, { computeDtype });
    const { core } = model;
    for (const [name, options] of Object.entries({
      plain: { r: 3, alpha: 5 },
      stabilized: { r: 4, useRslora: true, targetModules: ['q_proj', 'down_proj'] },
      dora: { r: 4, useDora: true },
      pissa: { r: 4, init: 'pissa' as const },
    })) {
      const { layers } = model.addLora(name, options);
      for (const [i, { B }] of layers.entries()) randomUniform(B, -0.3, 0.3, 7, i);
      using frozen = new FrozenAdapter(core, name);
      t.equal(frozen.layers.size, layers.length);
      const rows = { tokens: Int32Array.from(ids), batch: 1, length: ids.length };
      const bits = async (more: object) => {
        using hidden = hiddenStates(core, undefined, rows, { adapter: name, checkpointing: 'none', ...more });
        return [...(await hidden.readBits())];
      };
      const expected = await bits({});
      t.same(await bits({ frozen: frozen.layers }), expected, `${name} in ${computeDtype}`);
      for (const { B } of layers) fill(B, 0);
      t.notSame(await bits({}), expected);
      t.same(await bits({ frozen: frozen.layers }), expected, 'it is a copy');
      model.removeLora(name);
    }
  }
});

t.test('PiSSA, trained and saved', async (t) => {
  const folder = t.testdir({});
  const options = {
    r: 3,
    alpha: 5,
    useRslora: true,
    rankPattern: { 'layers.1.*gate_proj': 2 },
    alphaPattern: { k_proj: 7 },
    targetModules: ['q_proj', 'k_proj', 'gate_proj'],
    init: 'pissa' as const,
  };
  await using model = await QuantizedModel.load(whole, plain);
  await using trainer = await QLoRATrainer.create({
    model,
    dataset: [{ inputIds: ids }],
    outputDir: join(folder, 'out'),
    lora: options,
    learningRate: 1e-2,
    gradientAccumulationSteps: 1,
    maxSteps: 5,
  });
  const before = await model.logits(ids);
  t.ok(largestError(before, reference('base.logits'), 1) < 1e-4, 'the start is the base');
  await trainer.train();
  const trained = await model.logits(ids);
  t.ok(largestError(trained, before, 1) > 0.05, 'it learnt');
  const config = readJson<Record<string, unknown>>(folder, 'out', 'adapter_config.json');
  t.match(config, { r: 6, lora_alpha: 5 * Math.SQRT2, rank_pattern: { 'layers.1.*gate_proj': 4 }, use_rslora: true });
  t.match(config, { init_lora_weights: true, alpha_pattern: { k_proj: 7 * Math.SQRT2 } });
  await using again = await QuantizedModel.load(whole, plain);
  await again.loadLora('a', join(folder, 'out'));
  t.ok(largestError(await again.logits(ids), trained, 1) < 1e-4, 'over the whole weights it computes the same');

  // A checkpoint goes on: the start is made again, A and B are read.
  const fresh = again.addLora('fresh', { ...options, seed: 42 });
  await fresh.restore(join(folder, 'out'));
  t.same(await again.logits(ids, { adapter: 'fresh' }), trained, 'the same bits');
});

t.test('a run with PiSSA and whole modules goes on from a checkpoint bit for bit', async (t) => {
  const folder = t.testdir({});
  const run = async (name: string, resume?: string) => {
    const outputDir = join(folder, name);
    await using trainer = await QLoRATrainer.create({
      model: demo,
      dataset: Array.from({ length: 6 }, (_, i) => ({ text: `What is ${i} plus 3? ${i + 3}` })),
      outputDir,
      lora: { r: 4, targetModules: ['q_proj', 'up_proj'], modulesToSave: ['lm_head'], init: 'pissa', dropout: 0.1 },
      gradientAccumulationSteps: 1,
      saveSteps: 3,
      maxSteps: 6,
    });
    await trainer.train(resume ? { resume } : {});
    return readSafetensors(join(outputDir, 'adapter_model.safetensors'));
  };
  const whole = await run('whole');
  t.same(await run('resumed', join(folder, 'whole', 'checkpoint-3')), whole);
});
