/** Generation against transformers: what its processors leave of logits, and whole texts of small models. */
import { join } from 'node:path';
import t from 'tap';
import { beamSearch } from '../../lib/generate/beams.js';
import { type GenerateOptions, resolveGenerateOptions } from '../../lib/generate/options.js';
import { generateIds } from '../../lib/generate/tokens.js';
import { QuantizedModel } from '../../lib/index.js';
import { type ConstrainOptions, constrainLogits, type WarpOptions, warpLogits } from '../../lib/ops/logits-process.js';
import { Stream, Tensor } from '../../lib/tensor.js';
import { forEachIsa, largestError } from '../support/op-harness.js';
import { readJson, referencesDir } from '../support/references.js';
import { readSafetensors, type StoredTensor, valuesOf } from '../support/safetensors.js';

interface Processed {
  options: WarpOptions & Omit<ConstrainOptions, 'seen' | 'forbidden'> & { forbidden?: number[] };
  tensor: string;
}
interface Generated {
  model: string;
  about: string;
  prompt: number[];
  endTokens: number[];
  options: GenerateOptions & { minLength?: number; earlyStopping?: boolean | 'never' };
  ids: number[];
  score?: number;
}

const folder = referencesDir('generation');
const { processed, generated } = readJson<{ processed: Processed[]; generated: Generated[] }>(folder, 'index.json');
const stored = readSafetensors(join(folder, 'processed.safetensors'));
const tensor = (name: string) => stored.get(name) as StoredTensor;

/** In fp64, of rows of V. */
function softmax(logits: Float32Array, V: number): Float64Array {
  const out = new Float64Array(logits.length);
  for (let begin = 0; begin < out.length; begin += V) {
    const row = logits.subarray(begin, begin + V);
    const most = row.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
    const sum = row.reduce((s, z) => s + Math.exp(z - most), 0);
    row.forEach((z, i) => {
      out[begin + i] = Math.exp(z - most) / sum;
    });
  }
  return out;
}

await forEachIsa(t, import.meta.url, async () => {
  await t.test('what is left of logits, and with which probability', async (t) => {
    t.ok(processed.length > 20);
    const { shape, data } = tensor('logits');
    const V = shape[1] as number;
    for (const { options, tensor: name } of processed) {
      const stream = new Stream();
      const { forbidden, ...rest } = options;
      const logits = Tensor.from(stream, data as Float32Array, shape);
      const seen = Tensor.from(stream, tensor('seen').data as Int32Array, tensor('seen').shape);
      const constraints = {
        ...rest,
        seen,
        seenLength: seen.dim(1),
        forbidden: forbidden && Tensor.from(stream, Int32Array.from(forbidden), [forbidden.length]),
      };
      const actual = softmax(await warpLogits(constrainLogits(logits, constraints), rest).read(), V);
      const expected = valuesOf(tensor(name));
      const kept = (p: ArrayLike<number>) => Array.from(p, (x) => x > 0);
      t.same(kept(actual), kept(expected), `${JSON.stringify(options)}: the same tokens`);
      t.ok(largestError(actual, expected, 1) < 2e-6, 'the same probabilities');
      await stream.close();
    }
  });

  for (const name of new Set(generated.map(({ model }) => model))) {
    await t.test(name, async (t) => {
      const directory = join(referencesDir('models'), name);
      await using model = await QuantizedModel.load(directory, { quantization: 'none', computeDtype: 'f32' });
      for (const { about, prompt, endTokens, options, ids, score } of generated.filter((g) => g.model === name)) {
        const { minLength = 0, earlyStopping = false, ...given } = options;
        const resolved = resolveGenerateOptions(model.core, { doSample: false, ...given }, 'tokens');
        const all = { ...resolved, minLength, earlyStopping, endTokens: new Set(endTokens) };
        const made: number[] = [];
        for await (const id of generateIds(model.core, prompt, all)) made.push(id);
        const text = endTokens.includes(ids.at(-1) as number) ? ids.slice(0, -1) : ids;
        t.same(made, text, about);
        if (score === undefined) continue;
        const found = await beamSearch(model.core, prompt, { ...all, minNewTokens: all.minNewTokens ?? 0 });
        t.ok(Math.abs(found.score - score) < 1e-4 * Math.max(1, Math.abs(score)), `${about}: ${found.score}, ${score}`);
      }
    });
  }
});
