/** Twenty steps against PyTorch and PEFT: references/models/README.md, llama-train. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import t, { type Test } from 'tap';
import { QLoRATrainer, type TrainerOptions } from '../../lib/index.js';
import { forEachIsa, largestError } from '../support/op-harness.js';
import { readJson, referencesDir } from '../support/references.js';
import { readSafetensors, type StoredTensor, valuesOf } from '../support/safetensors.js';

interface Curve {
  loss: number[];
  grad_norm: number[];
}
interface Expected {
  steps: { input_ids: number[]; labels: number[] }[][][];
  lora: Curve;
  full: Curve;
  probe_input_ids: number[];
}

const directory = join(referencesDir('models'), 'llama-train');
const expected = readJson<Expected>(directory, 'expected.json');
const stored = readSafetensors(join(directory, 'expected.safetensors'));
const valuesAt = (tensors: Map<string, StoredTensor>, name: string) => valuesOf(tensors.get(name) as StoredTensor);

const rowsOf = (step: Expected['steps'][number]) =>
  step.flat().map(({ input_ids, labels }) => ({ inputIds: input_ids, labels }));
const common = {
  model: directory,
  dataset: rowsOf(expected.steps[0] as Expected['steps'][number]),
  computeDtype: 'f32',
  batchSize: 2,
  gradientAccumulationSteps: 2,
  learningRate: 1e-3,
  maxGradNorm: 0.3,
  optimizer: 'adamw_32bit',
} as const satisfies Omit<TrainerOptions, 'outputDir'>;

/** Loss and gradient norm of every step within 1e-4, relative. */
async function follow(t: Test, trainer: QLoRATrainer, curve: Curve): Promise<void> {
  for (const [i, want] of curve.loss.entries()) {
    const { loss, gradNorm } = await trainer.trainStep(rowsOf(expected.steps[i] as Expected['steps'][number]));
    const lossError = Math.abs(loss - want) / want;
    const normError = Math.abs(gradNorm - (curve.grad_norm[i] as number)) / (curve.grad_norm[i] as number);
    if (!(lossError <= 1e-4)) t.fail(`step ${i + 1}: loss ${loss}, expected ${want}`);
    if (!(normError <= 1e-4)) t.fail(`step ${i + 1}: gradient norm ${gradNorm}, expected ${curve.grad_norm[i]}`);
  }
  const logits = await trainer.model.logits(expected.probe_input_ids);
  const want = valuesAt(stored, `${trainer.adapter ? 'lora' : 'full'}.probe_logits`);
  const error = largestError(logits, want, 1);
  t.ok(error <= 1e-3, `probe logits: ${error.toExponential(2)}`);
}

/** 99.9% of the entries within `most` of the largest change of any entry, all within `all`. */
function checkChange(
  t: Test,
  entries: { name: string; start: Float32Array; got: Float32Array; want: Float32Array }[],
  most: number,
  all: number,
): void {
  const change = Math.max(...entries.map(({ start, want }) => largestError(want, start, 1)));
  const errors = entries.flatMap(({ got, want }) =>
    Array.from(got, (x, i) => Math.abs(x - (want[i] as number)) / change),
  );
  errors.sort((a, b) => a - b);
  const worst = errors.at(-1) as number;
  const mostly = errors[Math.floor(errors.length * 0.999)] as number;
  t.ok(mostly <= most, `99.9% of the entries: ${mostly.toExponential(2)} of the largest change`);
  t.ok(worst <= all, `all entries: ${worst.toExponential(2)} of the largest change`);
}

await forEachIsa(t, import.meta.url, async () => {
  const outputDir = mkdtempSync(join(tmpdir(), 'qlora-curves-'));
  t.teardown(() => rmSync(outputDir, { recursive: true }));

  for (const gradientCheckpointing of [false, true]) {
    await t.test(`LoRA over NF4, checkpointing ${gradientCheckpointing}`, async (t) => {
      await using trainer = await QLoRATrainer.create({
        ...common,
        outputDir,
        gradientCheckpointing,
        quantization: { type: 'nf4', blockSize: 64, doubleQuant: true },
        initialAdapter: join(directory, 'adapter-initial'),
      });
      await follow(t, trainer, expected.lora);
      const saved = await trainer.save();
      const weights = 'adapter_model.safetensors';
      const [got, start, want] = [saved, join(directory, 'adapter-initial'), join(directory, 'adapter-final')].map(
        (d) => readSafetensors(join(d, weights)),
      ) as [Map<string, StoredTensor>, Map<string, StoredTensor>, Map<string, StoredTensor>];
      t.same([...got.keys()].sort(), [...want.keys()].sort(), 'PEFT names');
      const entries = [...want.keys()].map((name) => ({
        name,
        start: valuesAt(start, name),
        got: valuesAt(got, name),
        want: valuesAt(want, name),
      }));
      checkChange(t, entries, 1e-3, 2e-2);
    });
  }

  await t.test('all weights in fp32', async (t) => {
    await using trainer = await QLoRATrainer.create({ ...common, outputDir, quantization: 'none', lora: 'none' });
    await follow(t, trainer, expected.full);
    const start = readSafetensors(join(directory, 'model.safetensors'));
    const entries = [];
    for (const [name, tensor] of trainer.model.core.weights.dense) {
      if (!stored.has(`full.final.${name}`)) continue;
      entries.push({
        name,
        start: valuesAt(start, name),
        got: await tensor.read(),
        want: valuesAt(stored, `full.final.${name}`),
      });
    }
    t.equal(entries.length, [...stored.keys()].filter((key) => key.startsWith('full.final.')).length);
    checkChange(t, entries, 1e-2, 5e-2);
  });
});
