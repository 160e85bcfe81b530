/** An adapter merged into 16-bit weights, against the arithmetic of PEFT in fp64 and the logits of model and adapter. */
import { spawnSync } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import t, { type Test } from 'tap';
import { type LoadOptions, QLoRATrainer, QuantizedModel, setLogger } from '../../lib/index.js';
import { mergeModel } from '../../lib/models/merge.js';
import { driftSentence, isRounding } from '../../lib/models/merge-drift.js';
import { dequantizeWeight } from '../../lib/ops/quantize.js';
import { largestError } from '../support/op-harness.js';
import { packageRoot, readJson, referencesDir } from '../support/references.js';
import { readSafetensors, type StoredTensor, valuesOf } from '../support/safetensors.js';

const models = referencesDir('models');
const demo = join(packageRoot(), 'examples', 'demo', 'model');
const ids = Array.from({ length: 24 }, (_, i) => (i * 31 + 7) % 190);

/** Relative size of half a unit in the last place. */
const half: Partial<Record<string, number>> = { F32: 2 ** -24, BF16: 2 ** -8, F16: 2 ** -11 };

function tensorsOf(folder: string): Map<string, StoredTensor> {
  const files = readdirSync(folder).filter((name) => /^(adapter_)?model.*\.safetensors$/.test(name));
  return new Map(files.flatMap((name) => [...readSafetensors(join(folder, name))]));
}

interface PeftConfig {
  r: number;
  lora_alpha: number;
  use_rslora: boolean;
  use_dora: boolean;
}

/** What PEFT's merge makes of a weight, in fp64. */
function peftMerge(
  weight: Float32Array,
  [N, K]: [number, number],
  adapter: Map<string, StoredTensor>,
  path: string,
  config: PeftConfig,
): Float64Array {
  if (!adapter.has(`base_model.model.${path}.lora_A.weight`)) return Float64Array.from(weight);
  const part = (suffix: string) => valuesOf(adapter.get(`base_model.model.${path}.${suffix}`) as StoredTensor);
  const [A, B] = [part('lora_A.weight'), part('lora_B.weight')];
  const r = A.length / K;
  const scale = config.lora_alpha / (config.use_rslora ? Math.sqrt(r) : r);
  const merged = new Float64Array(N * K);
  for (let n = 0; n < N; n++) {
    let squares = 0;
    for (let k = 0; k < K; k++) {
      let sum = 0;
      for (let i = 0; i < r; i++) sum += (B[n * r + i] as number) * (A[i * K + k] as number);
      const value = (weight[n * K + k] as number) + scale * sum;
      merged[n * K + k] = value;
      squares += value * value;
    }
    if (!config.use_dora) continue;
    const factor = (part('lora_magnitude_vector')[n] as number) / Math.sqrt(squares);
    for (let k = 0; k < K; k++) merged[n * K + k] = (merged[n * K + k] as number) * factor;
  }
  return merged;
}

async function checkMerge(t: Test, name: string, options: LoadOptions, drift: number): Promise<void> {
  const directory = join(models, name);
  await using model = await QuantizedModel.load(directory, { computeDtype: 'f32', ...options });
  await model.loadLora('a', join(directory, 'adapter'));
  const out = join(t.testdir({}), 'parent', 'merged');
  const told: [string, object | undefined][] = [];
  setLogger((level, _, fields) => told.push([level, fields]));
  t.teardown(() => setLogger(null));
  const { logitDrift } = await model.merge(out);
  t.ok(logitDrift > 0 && logitDrift < drift, `drift ${logitDrift}`);
  const probe = Array.from({ length: 16 }, (_, i) =>
    Math.floor(((i + 0.5) * (model.config.vocab_size as number)) / 16),
  );
  const [base, adapted] = await Promise.all([null, 'a'].map((adapter) => model.logits(probe, { adapter })));
  const most = (values: Iterable<number>) => Math.max(...Array.from(values, Math.abs));
  const [largestLogit, adapterChange] = [
    most(adapted ?? []),
    most(Array.from(adapted ?? [], (x, i) => x - (base?.[i] ?? 0))),
  ];
  t.same(told.at(-1), ['info', { logitDrift, largestLogit, adapterChange }], 'what it means is told');

  const [before, after] = [tensorsOf(directory), tensorsOf(out)];
  t.same(
    [...after.keys()].sort(),
    [...before.keys()].filter((key) => !key.includes('inv_freq')).sort(),
    'the same tensors',
  );
  const adapter = tensorsOf(join(directory, 'adapter'));
  const config = readJson<PeftConfig>(directory, 'adapter', 'adapter_config.json');
  for (const [key, tensor] of after) {
    const original = before.get(key) as StoredTensor;
    t.equal(tensor.dtype, original.dtype, `${key}: the dtype of the file`);
    t.same(tensor.shape, original.shape);
    const linear = model.core.weights.linears.find(({ path }) => `${path}.weight` === key);
    if (!linear) {
      t.same(tensor.data, original.data, `${key}: as it was`);
      continue;
    }
    using base = dequantizeWeight(linear.weight, 'f32');
    const want = peftMerge(await base.read(), tensor.shape as [number, number], adapter, linear.path, config);
    const got = valuesOf(tensor);
    const wrong = want.findIndex((x, i) => {
      const allowed = (half[tensor.dtype] as number) * Math.abs(x) * 1.01 + 1e-6;
      return !(Math.abs((got[i] as number) - x) <= allowed);
    });
    if (wrong >= 0) t.fail(`${key}[${wrong}]: ${got[wrong]}, expected ${want[wrong]}`);
  }

  await using merged = await QuantizedModel.load(out, { computeDtype: 'f32', quantization: 'none' });
  const error = largestError(await merged.logits(ids), await model.logits(ids, { adapter: 'a' }), 1);
  t.ok(error < drift, `logits of the folder: ${error}`);
  t.not(
    largestError(await merged.logits(ids), await model.logits(ids, { adapter: null }), 1) < 10 * drift,
    'not the base',
  );
  t.notOk('quantization_config' in merged.config);
}

t.test('weights are those of PEFT, rounded once', async (t) => {
  const nf4 = { quantization: { type: 'nf4' } } as const;
  await t.test('LoRA over files in f16', (t) => checkMerge(t, 'llama', { quantization: 'none' }, 0.02));
  await t.test('rsLoRA over tied shards', (t) => checkMerge(t, 'llama3', { quantization: 'none' }, 0.2));
  await t.test('DoRA with biases', (t) => checkMerge(t, 'llama-bias', { quantization: 'none' }, 0.2));
  await t.test('q and v alone, with biases, tied', (t) => checkMerge(t, 'qwen2', { quantization: 'none' }, 0.2));
  await t.test('biases over 4 bits', (t) => checkMerge(t, 'qwen2-yarn', nf4, 0.2));
  await t.test('over 4 bits', (t) => checkMerge(t, 'deepseek-coder', nf4, 0.2));
  await t.test('DoRA over 4 bits', (t) => checkMerge(t, 'llama-bias', nf4, 0.2));
  await t.test('over 8 bits', (t) => checkMerge(t, 'llama', { quantization: { type: 'int8' } }, 1));
});

t.test('shards, the base alone, and a bitsandbytes checkpoint', async (t) => {
  const folder = t.testdir({});
  const checkpoint = join(referencesDir('quantization'), 'checkpoints', 'llama-64-nf4-double');
  await using model = await QuantizedModel.load(checkpoint, { computeDtype: 'f32' });
  const manners = { training: undefined, chatTemplate: undefined, endTokens: new Set<number>() };
  const out = join(folder, 'out');
  mkdirSync(out); // an empty folder will do
  await mergeModel(model.core, out, { adapter: undefined, manners, shardBytes: 30_000 });
  const shards = readdirSync(out).filter((name) => name.endsWith('.safetensors'));
  t.ok(shards.length > 3);
  t.match(shards[0], new RegExp(`^model-00001-of-${String(shards.length).padStart(5, '0')}.safetensors$`));
  const index = readJson<{ metadata: { total_size: number } }>(out, 'model.safetensors.index.json');
  const tensors = tensorsOf(out);
  t.equal(
    index.metadata.total_size,
    [...tensors.values()].reduce((sum, { data }) => sum + data.byteLength, 0),
  );
  t.ok([...tensors.values()].every(({ dtype }) => dtype === 'BF16'));
  t.same(Object.keys(readJson(out, 'config.json')).includes('quantization_config'), false);
  await using merged = await QuantizedModel.load(out, { computeDtype: 'f32', quantization: 'none' });
  const logits = await model.logits(ids);
  t.ok(largestError(await merged.logits(ids), logits, Math.max(...logits.map(Math.abs))) < 2e-2);
});

t.test('tokenizer, template and stop tokens go with it', async (t) => {
  const source = join(t.testdir({}), 'model');
  cpSync(demo, source, { recursive: true });
  const config = readJson<{ eos_token_id: number; vocab_size: number }>(source, 'config.json');
  const other = config.vocab_size - 1;
  const { chat_template: _, ...plain } = readJson<Record<string, unknown>>(source, 'tokenizer_config.json');
  writeFileSync(join(source, 'tokenizer_config.json'), JSON.stringify(plain));
  writeFileSync(join(source, 'generation_config.json'), JSON.stringify({ eos_token_id: other, top_k: 7 }));
  await using model = await QuantizedModel.load(source);
  const tokenizer = model.core.tokenizer;
  const adapter = model.addLora('a', { r: 2 });
  adapter.training = { template: 'alpaca-lit-gpt' };
  const out = join(t.testdirName, 'merged');
  await model.merge(out);
  for (const name of ['tokenizer.json', 'tokenizer_config.json']) {
    t.same(readFileSync(join(out, name)), readFileSync(join(source, name)), name);
  }
  t.same(readJson(out, 'generation_config.json'), { eos_token_id: [other, tokenizer?.eosTokenId], top_k: 7 });
  await using merged = await QuantizedModel.load(out);
  const question = { instruction: 'Say "A" or {{ this }}.' };
  const options = { maxNewTokens: 4 };
  t.equal(await merged.generate(question, options), await model.generate(question, options), 'the same template');
  t.equal(
    await merged.generate([{ role: 'user', content: question.instruction }], options),
    await model.generate(question, options),
    'as a chat too',
  );
  const rendered = merged.core.tokenizer?.chatTemplate().render(
    [
      { role: 'user', content: 'Q' },
      { role: 'assistant', content: 'A' },
    ],
    { tokens: { eos_token: '</s>', bos_token: '<s>' } },
  );
  t.match(rendered, /^<s>.*### Instruction:\nQ\n\n### Response:A<.s>\n\n$/s);
  t.match(readJson(out, 'qlora_node.json'), { template: 'alpaca-lit-gpt' });
  const row = { ...question, output: '42' };
  await using trainer = await QLoRATrainer.create({ model: out, dataset: [row], outputDir: join(out, 'again') });
  t.notMatch((await trainer.explain(row)).tokens.join(''), 'Response: ', 'training goes on with it');
  t.match((await trainer.explain(row)).tokens.join(''), 'Response:42');
});

t.test('whole or not at all', async (t) => {
  const folder = t.testdir({ filled: { 'a.txt': '' }, file: '' });
  await using model = await QuantizedModel.load(demo);
  for (const name of ['filled', 'file']) {
    await t.rejects(model.merge(join(folder, name)), { code: 'ERR_QLORA_OUTPUT_EXISTS', message: /empty folder/ });
  }
  const left = () => readdirSync(folder).sort();
  t.same(left(), ['file', 'filled']);
  const reason = new Error('enough');
  await t.rejects(model.merge(join(folder, 'out'), { signal: AbortSignal.abort(reason) }), reason);
  const abort = new AbortController();
  const running = model.merge(join(folder, 'out'), { signal: abort.signal });
  const poll = setInterval(() => {
    // As soon as there are weights, and long before all is done.
    const temporary = left().find((name) => name.includes('tmp'));
    if (temporary && existsSync(join(folder, temporary, 'model.safetensors'))) abort.abort(reason);
  }, 0);
  await t.rejects(running, reason);
  clearInterval(poll);
  t.same(left(), ['file', 'filled'], 'nothing is left');

  // A value that the dtype of the files cannot hold.
  const adapter = model.addLora('big', { r: 1, alpha: 1, targetModules: ['q_proj'] });
  for (const layer of adapter.layers) {
    await layer.write('A', new Float32Array(layer.inFeatures).fill(3e38));
    await layer.write('B', new Float32Array(layer.outFeatures).fill(10));
  }
  await t.rejects(model.merge(join(folder, 'out')), { code: 'ERR_QLORA_NON_FINITE' });
  t.same(left(), ['file', 'filled']);
  await t.rejects(model.merge(join(folder, 'out'), { adapter: 'none' }), { code: 'ERR_QLORA_ADAPTER_UNKNOWN' });
  await t.rejects(model.merge(join(folder, 'out'), { bits: 4 } as object), { code: 'ERR_QLORA_OPTION_UNKNOWN' });
  await model.merge(join(folder, 'out'), { adapter: null });
  t.same(left(), ['file', 'filled', 'out']);
  rmSync(join(folder, 'out'), { recursive: true });
});

t.test('a disk that takes no more', async (t) => {
  const folder = t.testdir({});
  // tap's hook in child processes would end at the signal of this limit.
  const run = spawnSync(
    'sh',
    [
      '-c',
      `unset NODE_OPTIONS; ulimit -f 100; exec "${process.execPath}" --input-type=module -e '
    import { QuantizedModel } from "${new URL('../../lib/index.js', import.meta.url)}";
    const model = await QuantizedModel.load("${demo}");
    await model.merge("out").catch((e) => console.log(e.code, e.message));
    await model.dispose();'`,
    ],
    { cwd: folder, encoding: 'utf8' },
  );
  t.match(run.stdout, /^ERR_QLORA_WRITE_FAILED .*cannot write it/, run.stderr);
  t.same(readdirSync(folder), [], 'nothing is left');
});

t.test('drift in words', async (t) => {
  const good = { logitDrift: 0.1, largestLogit: 10, adapterChange: 4 };
  t.ok(isRounding(good));
  t.match(
    driftSentence(good),
    /at most 0\.100, 1\.0% of the largest: good, .* up to 5%; the adapter moves them by 4\.00$/,
  );
  const bad = { logitDrift: 0.6, largestLogit: 10, adapterChange: 0 };
  t.notOk(isRounding(bad));
  t.match(driftSentence(bad), /6\.0% of the largest: more than the 5% .*: compare answers before you use it$/);
});
