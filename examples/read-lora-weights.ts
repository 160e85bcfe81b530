/**
 * Trains an adapter for some steps and looks into it: how far did it move each layer that it targets?
 *
 *   node dist/examples/read-lora-weights.js [output folder]
 */
import { type LoraLinear, QLoRATrainer } from '../lib/index.js';

const [outputDir = 'demo-output/read-lora-weights'] = process.argv.slice(2);

await using trainer = await QLoRATrainer.create({
  model: 'examples/demo/model',
  dataset: Array.from({ length: 20 }, (_, n) => ({ instruction: `Double ${n}.`, output: String(2 * n) })),
  outputDir,
  lora: { r: 4, alpha: 8, targetModules: ['q_proj', 'v_proj'] },
  batchSize: 10,
  gradientAccumulationSteps: 1,
  maxSteps: 6,
  learningRate: 4e-3,
});
await trainer.train();

/** The Frobenius norm of scale * B A, the change of the layer's weight [outFeatures, inFeatures]. */
async function changeOf(layer: LoraLinear): Promise<number> {
  const [A, B] = [await layer.read('A'), await layer.read('B')]; // [r, inFeatures], [outFeatures, r]
  let squares = 0;
  for (let n = 0; n < layer.outFeatures; n++) {
    for (let k = 0; k < layer.inFeatures; k++) {
      let sum = 0;
      for (let i = 0; i < layer.r; i++) {
        sum += (B[n * layer.r + i] as number) * (A[i * layer.inFeatures + k] as number);
      }
      squares += (layer.scale * sum) ** 2;
    }
  }
  return Math.sqrt(squares);
}

for (const layer of trainer.adapter?.layers ?? []) {
  const shape = `${layer.outFeatures} x ${layer.inFeatures}`;
  console.log(`${layer.path} (${shape}, r ${layer.r}): changed by ${(await changeOf(layer)).toFixed(4)}`);
}

// An adapter can be written to as well: B set to zero takes a layer's change away.
const [first] = trainer.adapter?.layers ?? [];
if (first) {
  await first.write('B', new Float32Array(first.outFeatures * first.r));
  console.log(`${first.path} now: changed by ${(await changeOf(first)).toFixed(4)}`);
}
