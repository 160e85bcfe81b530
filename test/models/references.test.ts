/** Whole models against what transformers and PEFT computed; every tolerance is that of references/models/README.md. */
import { createHash } from 'node:crypto';
import { cpSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Tape } from '../../lib/autograd.js';
import { hiddenStates, type TokenRows } from '../../lib/models/core.js';
import type { DecoderPass } from '../../lib/models/decoder.js';
import { fill, zeros } from '../../lib/ops/elementwise.js';
import { linearCrossEntropy } from '../../lib/ops/linear-cross-entropy.js';
import { dequantizeWeight } from '../../lib/ops/quantize.js';
import { Tensor } from '../../lib/tensor.js';
import { forEachIsa, largestError } from '../support/op-harness.js';
import { ReferenceModel, shift } from '../support/reference-model.js';
import { readJson, referencesDir } from '../support/references.js';
import { readSafetensors, valuesOf } from '../support/safetensors.js';
import t, { type Test, testDevice } from '../support/testing.js';

const cases = ['llama', 'llama3', 'llama-bias', 'deepseek-coder', 'qwen2', 'qwen2-yarn'];
/** How far bf16 may be off: 2.5e-2, and where transformers' own bf16 is further off than that, as far as it. */
const bf16Error = (name: string) => ({ qwen2: 5.2e-2 })[name] ?? 2.5e-2;

interface Expected {
  sequences: { input_ids: number[]; labels: number[] }[];
  targets: number;
  loss: Record<'base' | 'adapter' | 'nf4' | 'nf4_adapter', number>;
  greedy: { prompt: number[]; base: number[]; adapter: number[] };
  nf4: {
    not_quantized: string[];
    modules: Record<string, { packed_sha256: string; offset: number; dequantized_sha256: string; shape: number[] }>;
  };
  packed?: { input_ids: number[]; position_ids: number[]; segment_ids: number[]; labels: number[]; loss: number };
}

type LabelledRows = TokenRows & { labels: Int32Array };

const sha256 = (bytes: Uint8Array) => createHash('sha256').update(bytes).digest('hex');
const magnitude = (values: Float32Array) => values.reduce((m, v) => Math.max(m, Math.abs(v)), 0);

/** Sums the losses of all rows over `targets`, and their gradients into the adapter's. */
async function lossAndGradients(
  { core }: ReferenceModel,
  rows: LabelledRows[],
  targets: number,
  pass: Pick<DecoderPass, 'checkpointing' | 'keptInputs'>,
): Promise<{ loss: number; gradients: Map<string, Float32Array> }> {
  const [adapter] = core.adapters.values();
  if (!adapter) throw new Error('no adapter is loaded');
  for (const p of adapter.parameters) {
    p.requiresGrad = true;
    p.gradient = zeros(core.stream, p.shape, 'f32', 'optimizer');
  }
  let total = 0;
  for (const row of rows) {
    const tape = new Tape();
    using hidden = hiddenStates(core, tape, row, { adapter: adapter.name, ...pass });
    using labels = Tensor.from(core.stream, row.labels, [row.labels.length]);
    using loss = linearCrossEntropy(tape, hidden, core.weights.decoder.head, labels, { scale: 1 / targets });
    using one = new Tensor(core.stream, 'f32', [1]);
    fill(one, 1);
    tape.backward(loss, one);
    total += (await loss.read())[0] as number;
  }
  const gradients = new Map<string, Float32Array>();
  for (const layer of adapter.layers) {
    const key = `base_model.model.${layer.path}`;
    gradients.set(`${key}.lora_A.weight`, (await layer.A.gradient?.read()) as Float32Array);
    gradients.set(`${key}.lora_B.weight`, (await layer.B.gradient?.read()) as Float32Array);
    if (layer.magnitude) {
      gradients.set(`${key}.lora_magnitude_vector`, (await layer.magnitude.gradient?.read()) as Float32Array);
    }
  }
  for (const p of adapter.parameters) {
    p.requiresGrad = false;
    p.gradient?.dispose();
    p.gradient = undefined;
  }
  return { loss: total, gradients };
}

async function checkCase(t: Test, name: string): Promise<void> {
  const directory = join(referencesDir('models'), name);
  const expected = readJson<Expected>(directory, 'expected.json');
  const stored = readSafetensors(join(directory, 'expected.safetensors'));
  const reference = (key: string) => {
    const tensor = stored.get(key);
    if (!tensor) throw new Error(`no reference ${key}`);
    return valuesOf(tensor);
  };
  const { sequences, targets } = expected;
  const checkLogits = async (model: ReferenceModel, key: string, adapter?: string, allowed = 2e-4) => {
    const sequence = sequences[Number(key.at(-1))] as Expected['sequences'][number];
    const want = reference(key);
    const error = largestError(await model.logits(sequence.input_ids, adapter), want, magnitude(want));
    t.ok(error <= allowed, `${key}: ${error.toExponential(2)}`);
  };
  const checkLoss = async (model: ReferenceModel, key: keyof Expected['loss'], adapter?: string) => {
    let sum = 0;
    for (const { input_ids, labels } of sequences) sum += await model.loss(input_ids, labels, adapter);
    const error = Math.abs(sum / targets - expected.loss[key]);
    t.ok(error <= 1e-4, `loss.${key}: ${error.toExponential(2)}`);
  };
  const checkGradients = (gradients: Map<string, Float32Array>, prefix: string) => {
    for (const [key, gradient] of gradients) {
      const want = reference(`${prefix}.${key}`);
      const error = largestError(gradient, want, magnitude(want));
      if (!(error <= 2e-4)) t.fail(`${prefix}.${key}: ${error.toExponential(2)}`);
    }
    const keys = [...stored.keys()].filter((key) => key.startsWith(`${prefix}.`));
    t.equal(gradients.size, keys.length, `${prefix}: every gradient`);
  };
  const rows = sequences.map(({ input_ids, labels }) => ({
    tokens: Int32Array.from(input_ids),
    batch: 1,
    length: input_ids.length,
    labels: shift(labels),
  }));

  await using model = await ReferenceModel.load(directory, 'f32');
  for (const i of [0, 1]) await checkLogits(model, `base.logits.${i}`);
  await checkLoss(model, 'base');
  const { prompt, base, adapter } = expected.greedy;
  t.same(await model.greedy(prompt, 24), base, 'greedy tokens');
  await model.loadAdapter('a', join(directory, 'adapter'));
  for (const i of [0, 1]) await checkLogits(model, `adapter.logits.${i}`, 'a');
  await checkLoss(model, 'adapter', 'a');
  t.same(await model.greedy(prompt, 24, 'a'), adapter, 'greedy with adapter');
  let unpadded = 0;
  const passes = [{ checkpointing: 'none' }, { checkpointing: 'blocks' }] as const;
  const offloaded = { checkpointing: 'blocks', keptInputs: 'host' } as const;
  for (const pass of testDevice === 'cpu' ? passes : [...passes, offloaded]) {
    const { loss, gradients } = await lossAndGradients(model, rows, targets, pass);
    const off = Math.abs(loss - expected.loss.adapter);
    t.ok(off <= 1e-4, `loss of the tape, ${Object.values(pass)}: ${off.toExponential(2)}`);
    checkGradients(gradients, 'adapter.grad');
    unpadded = loss;
  }
  if (expected.packed) {
    const { input_ids, position_ids, segment_ids, labels, loss } = expected.packed;
    const row = {
      tokens: Int32Array.from(input_ids),
      positions: Int32Array.from(position_ids),
      segmentIds: Int32Array.from(segment_ids),
      batch: 1,
      length: input_ids.length,
      labels: shift(labels),
    };
    const packed = await lossAndGradients(model, [row], targets, passes[0]);
    t.ok(Math.abs(packed.loss - loss) <= 1e-4, 'packed row: loss');
    checkGradients(packed.gradients, 'adapter.grad');
  }
  const padded = await lossAndGradients(model, [paddedBatch(rows)], targets, passes[0]);
  t.ok(Math.abs(padded.loss - unpadded) <= 1e-5, 'padded batch: loss');
  checkGradients(padded.gradients, 'adapter.grad');

  await using quantized = await ReferenceModel.load(directory, 'f32', {
    type: 'nf4',
    blockSize: 64,
    doubleQuant: true,
  });
  await checkQuantized(t, quantized, expected);
  await checkLogits(quantized, 'nf4.logits.0');
  await checkLoss(quantized, 'nf4');
  await quantized.loadAdapter('a', join(directory, 'adapter'));
  await checkLogits(quantized, 'nf4_adapter.logits.1', 'a');
  await checkLoss(quantized, 'nf4_adapter', 'a');
  checkGradients((await lossAndGradients(quantized, rows, targets, passes[0])).gradients, 'nf4_adapter.grad');

  for (const computeDtype of ['bf16', 'f16'] as const) {
    await using half = await ReferenceModel.load(directory, computeDtype);
    await checkLogits(half, 'base.logits.0', undefined, computeDtype === 'bf16' ? bf16Error(name) : 2.5e-2);
  }
  await checkNewConfig(t, directory, (model) => checkLogits(model, 'base.logits.0'));
}

/** All rows as one right-padded batch: padding changes nothing. */
function paddedBatch(rows: LabelledRows[]): LabelledRows {
  const length = Math.max(...rows.map((row) => row.length));
  const padded = (pick: (row: LabelledRows) => Int32Array, fillWith: number) =>
    Int32Array.from(rows.flatMap((row) => Array.from({ length }, (_, i) => pick(row)[i] ?? fillWith)));
  return {
    tokens: padded((r) => r.tokens, 7),
    segmentIds: padded((r) => new Int32Array(r.length), -1),
    labels: padded((r) => r.labels, -100),
    batch: rows.length,
    length,
  };
}

/** Packed bytes are equal; dequantized values too, but where the mean of the block maxima differs in its last bit. */
async function checkQuantized(t: Test, model: ReferenceModel, { nf4 }: Expected): Promise<void> {
  const linears = model.core.weights.linears;
  t.same(linears.map((l) => l.path).sort(), Object.keys(nf4.modules).sort(), 'the same layers are quantized');
  for (const { path, weight } of linears) {
    const want = nf4.modules[path] as Expected['nf4']['modules'][string];
    t.equal(sha256((await weight.tensors.data.readBits()) as Uint8Array), want.packed_sha256, `${path}: packed bytes`);
    t.ok(Math.abs((weight.tensors.offset as number) - want.offset) <= 1e-6 * Math.abs(want.offset), `${path}: offset`);
    if (weight.tensors.offset !== want.offset) continue;
    using values = dequantizeWeight(weight, 'f32');
    const bytes = (await values.readBits()) as Float32Array;
    t.equal(sha256(new Uint8Array(bytes.buffer)), want.dequantized_sha256, `${path}: dequantized values`);
  }
}

/** The same model with config.json as transformers 5 writes it. */
async function checkNewConfig(
  t: Test,
  directory: string,
  check: (model: ReferenceModel) => Promise<void>,
): Promise<void> {
  const copy = mkdtempSync(join(tmpdir(), 'qlora-config-'));
  t.teardown(() => rmSync(copy, { recursive: true }));
  cpSync(directory, copy, { recursive: true });
  cpSync(join(directory, 'config.transformers5.json'), join(copy, 'config.json'));
  await using model = await ReferenceModel.load(copy, 'f32');
  await check(model);
}

await forEachIsa(t, import.meta.url, async () => {
  for (const name of cases) await t.test(name, (t) => checkCase(t, name));
});
