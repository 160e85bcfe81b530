/** bitsandbytes checkpoints, in and out: references/README.md, quantization/checkpoints. */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import t, { type Test } from 'tap';
import { type LoadOptions, QuantizedModel, type QuantizeOptions } from '../../lib/index.js';
import { type SafetensorsItem, writeSafetensors } from '../../lib/io/safetensors.js';
import { forEachIsa, largestError } from '../support/op-harness.js';
import { readJson, referencesDir } from '../support/references.js';
import { readSafetensors, type StoredTensor, valuesOf } from '../support/safetensors.js';

const folder = join(referencesDir('quantization'), 'checkpoints');
const { models } = readJson<{
  models: Record<string, { quantized: boolean; type?: 'nf4' | 'fp4'; doubleQuant?: boolean; source?: string }>;
}>(folder, 'index.json');
const expected = readSafetensors(join(folder, 'expected.safetensors'));
const inputIds = Array.from(expected.get('input_ids')?.data as BigInt64Array | Int32Array, Number);

function optionsOf(name: string): QuantizeOptions {
  const { type, doubleQuant } = models[name] as { type: 'nf4' | 'fp4'; doubleQuant: boolean };
  return { type, doubleQuant, blockSize: 64 };
}

const tensorsOf = (directory: string) => readSafetensors(join(directory, 'model.safetensors'));
const bytesOf = ({ data }: StoredTensor) => new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
const isQuantized = (name: string) => name.includes('.weight.');

await forEachIsa(t, import.meta.url, async () => {
  const scratch = mkdtempSync(join(tmpdir(), 'qlora-checkpoints-'));
  t.teardown(() => rmSync(scratch, { recursive: true }));

  for (const [name, { quantized, source }] of Object.entries(models)) {
    await t.test(name, async (t) => {
      const directory = join(folder, name);
      const quantization = quantized ? undefined : 'none';
      await using model = await QuantizedModel.load(directory, { computeDtype: 'f32', quantization });
      const error = largestError(
        await model.logits(inputIds),
        valuesOf(expected.get(`${name}.logits`) as StoredTensor),
        1,
      );
      t.ok(error <= 1e-4, `logits: ${error.toExponential(2)}`);
      if (!quantized || !source) return;

      const copy = join(scratch, name);
      await model.save(copy);
      const [got, want] = [tensorsOf(copy), tensorsOf(directory)];
      t.same([...got.keys()].sort(), [...want.keys()].sort(), 'saved: the same keys');
      for (const [key, tensor] of want) {
        const other = got.get(key) as StoredTensor;
        if (name.endsWith('-storage') && key.endsWith('.weight') && want.has(`${key}.absmax`)) {
          t.same(bytesOf(other), bytesOf(tensor), `${key}: the same bytes, as u8`);
          continue;
        }
        if (other.dtype !== tensor.dtype || String(other.shape) !== String(tensor.shape)) {
          t.fail(`${key}: ${other.dtype} [${other.shape}], expected ${tensor.dtype} [${tensor.shape}]`);
        }
        if (!Buffer.from(bytesOf(other)).equals(Buffer.from(bytesOf(tensor)))) t.fail(`${key}: other bytes`);
      }
      await using again = await QuantizedModel.load(copy, { computeDtype: 'f32' });
      t.same(await again.logits(inputIds), await model.logits(inputIds), 'saved and loaded: the same bits');

      await using fresh = await QuantizedModel.load(join(folder, source), {
        computeDtype: 'f32',
        quantization: optionsOf(name),
      });
      await fresh.save(join(scratch, `${name}-fresh`));
      compareFresh(t, tensorsOf(join(scratch, `${name}-fresh`)), want, name);
    });
  }

  await t.test('biases, windows and layers left in 16 bits go through a checkpoint', async (t) => {
    const source = join(referencesDir('models'), 'qwen2-yarn');
    const quantization = { skipModules: ['q_proj', 'model.layers.0.mlp.down_proj'] };
    await using model = await QuantizedModel.load(source, { computeDtype: 'f32', quantization });
    const directory = join(scratch, 'qwen2');
    await model.save(directory);
    const [got, want] = [tensorsOf(directory), tensorsOf(source)];
    for (const [key, tensor] of want) if (key.endsWith('.bias')) t.same(got.get(key), tensor, key);
    await using again = await QuantizedModel.load(directory, { computeDtype: 'f32' });
    const ids = inputIds.map((id) => id % 200);
    t.same(await again.logits(ids), await model.logits(ids), 'saved and loaded: the same bits');
  });

  await t.test('8 bits, as LLM.int8 is stored', async (t) => {
    const options: LoadOptions = { computeDtype: 'f32', quantization: { type: 'int8' } };
    await using model = await QuantizedModel.load(join(folder, 'llama-64'), options);
    const directory = join(scratch, 'int8');
    await model.save(directory);
    const tensors = tensorsOf(directory);
    for (const { path, weight } of model.core.weights.linears) {
      const { N, K } = weight;
      t.match(tensors.get(`${path}.weight`), { dtype: 'I8', shape: [N, K] });
      t.match(tensors.get(`${path}.SCB`), { dtype: 'F32', shape: [N] });
      t.same(tensors.get(`${path}.weight_format`), { dtype: 'U8', shape: [], data: Uint8Array.of(0) });
    }
    t.match(readJson(directory, 'config.json'), {
      quantization_config: { load_in_8bit: true, load_in_4bit: false, quant_method: 'bitsandbytes' },
    });
    await using again = await QuantizedModel.load(directory, { computeDtype: 'f32' });
    t.same(await again.logits(inputIds), await model.logits(inputIds), 'saved and loaded: the same bits');
    t.equal(again.core.weights.linears[0]?.weight.originalDtype, 'bf16');

    const items = (change: (name: string, tensor: StoredTensor) => StoredTensor | undefined): SafetensorsItem[] =>
      [...tensors].flatMap(([name, tensor]) => {
        const { dtype, shape, data } = change(name, tensor) ?? tensor;
        return [{ name, dtype, shape, data: data as Float32Array }];
      });
    const wrong: [string, (tensor: StoredTensor) => StoredTensor, RegExp][] = [
      ['weight_format', (s) => ({ ...s, data: Uint8Array.of(1) }), /weight_format' must be 0/],
      ['SCB', ({ dtype, data }) => ({ dtype, shape: [1], data: data.slice(0, 1) }), /SCB' must be F32 \[/],
      ['weight', (s) => ({ ...s, dtype: 'U8' }), /must be I8/],
    ];
    for (const [part, change, message] of wrong) {
      const name = `${model.core.weights.linears[0]?.path}.${part}`;
      const path = join(directory, 'model.safetensors');
      await writeSafetensors(
        path,
        items((key, tensor) => (key === name ? change(tensor) : undefined)),
      );
      await t.rejects(QuantizedModel.load(directory), { code: 'ERR_QLORA_QUANT_STATE', message });
    }
  });

  await t.test('a load holds the 4-bit model and at most two of its largest tensors', async (t) => {
    const directory = join(scratch, 'wide');
    const source = readJson<Record<string, unknown>>(folder, 'llama-64', 'config.json');
    const largest = await writeWideModel(directory, source);
    await using model = await QuantizedModel.load(directory);
    const { peakBytes } = model.memory();
    t.ok(peakBytes < model.sizeBytes + 2 * largest, `peak ${peakBytes}, model ${model.sizeBytes}, largest ${largest}`);
  });
});

/**
 * Quantizing the source gives the bytes of every NF4 weight, and without double quantization its block maxima; for FP4
 * some in ten thousand values differ (ties), and nested offsets may differ in the last bit.
 */
function compareFresh(t: Test, got: Map<string, StoredTensor>, want: Map<string, StoredTensor>, name: string): void {
  const { type, doubleQuant } = optionsOf(name);
  // FP4's code 8 is zero as code 0 is, and bitsandbytes' CPU build chooses otherwise between them.
  const canonical = (code: number) => (type === 'fp4' ? code % 8 && code : code);
  let [differing, values] = [0, 0];
  for (const [key, tensor] of want) {
    if (!want.has(`${key}.absmax`) && !isQuantized(key)) continue;
    const [a, b] = [bytesOf(got.get(key) as StoredTensor), bytesOf(tensor)];
    if (want.has(`${key}.absmax`)) {
      values += 2 * a.length;
      a.forEach((byte, i) => {
        const other = b[i] as number;
        if (canonical(byte >> 4) !== canonical(other >> 4)) differing++;
        if (canonical(byte & 15) !== canonical(other & 15)) differing++;
      });
    } else if (key.endsWith('.absmax') && !doubleQuant && !Buffer.from(a).equals(Buffer.from(b))) {
      t.fail(`${key}: other block maxima`);
    } else if (key.endsWith('quant_map') && !Buffer.from(a).equals(Buffer.from(b))) {
      t.fail(`${key}: another map`);
    }
  }
  t.ok(differing <= (type === 'fp4' ? 1e-3 * values : 0), `quantized anew: ${differing} of ${values} differ`);
}

/** A model whose tensors are large beside its 4-bit layers; returns the bytes of the largest. */
async function writeWideModel(directory: string, source: Record<string, unknown>): Promise<number> {
  mkdirSync(directory);
  const [C, F, V, L] = [256, 2048, 512, 6];
  const config = {
    ...source,
    hidden_size: C,
    intermediate_size: F,
    vocab_size: V,
    num_hidden_layers: L,
    num_attention_heads: 4,
    num_key_value_heads: 4,
    head_dim: C / 4,
  };
  writeFileSync(join(directory, 'config.json'), JSON.stringify(config));
  const items: { name: string; dtype: 'BF16'; shape: number[]; data: Uint16Array }[] = [];
  const add = (name: string, ...shape: number[]) => {
    const size = shape.reduce((n, d) => n * d, 1);
    items.push({ name, dtype: 'BF16', shape, data: Uint16Array.from({ length: size }, (_, i) => 0x3c00 + (i % 97)) });
  };
  add('model.embed_tokens.weight', V, C);
  add('model.norm.weight', C);
  add('lm_head.weight', V, C);
  for (let i = 0; i < L; i++) {
    const layer = `model.layers.${i}`;
    for (const norm of ['input_layernorm', 'post_attention_layernorm']) add(`${layer}.${norm}.weight`, C);
    for (const p of ['q', 'k', 'v', 'o']) add(`${layer}.self_attn.${p}_proj.weight`, C, C);
    for (const p of ['gate', 'up']) add(`${layer}.mlp.${p}_proj.weight`, F, C);
    add(`${layer}.mlp.down_proj.weight`, C, F);
  }
  await writeSafetensors(join(directory, 'model.safetensors'), items, { format: 'pt' });
  return Math.max(...items.map(({ data }) => data.byteLength));
}
