/**
 * Fine-tunes the demo's model on rows that a program makes: it learns to double numbers.
 *
 *   node dist/examples/train-on-rows.js [output folder]
 */
import { QLoRATrainer, type Row } from '../lib/index.js';

const [outputDir = 'demo-output/train-on-rows'] = process.argv.slice(2);

/** Numbers that are asked at the end and never trained on. */
const heldOut = [7, 21, 38, 46];
const question = (n: number) => ({ instruction: `Double ${n}.` });
const row = (n: number): Row => ({ ...question(n), output: String(2 * n) });
const numbers = Array.from({ length: 50 }, (_, n) => n);

await using trainer = await QLoRATrainer.create({
  model: 'examples/demo/model',
  dataset: numbers.filter((n) => !heldOut.includes(n)).map(row),
  evalDataset: heldOut.map(row),
  outputDir,
  lora: { r: 16, alpha: 16, targetModules: 'all-linear' },
  batchSize: 16,
  gradientAccumulationSteps: 1,
  maxSteps: 30,
  learningRate: 4e-3,
  lrScheduler: 'linear',
  gradientCheckpointing: false,
});

const run = trainer.train();
for await (const event of run) {
  if (event.type === 'step' && event.step % 5 === 0) {
    console.log(`step ${event.step}: loss ${event.loss.toFixed(3)}, ${event.tokensPerSecond.toFixed(0)} tokens/s`);
  }
  if (event.type === 'eval') console.log(`held-out rows: loss ${event.loss.toFixed(3)}`);
}
const { adapterDir } = await run;
console.log(`${trainer.adapter?.trainableParameters} trained numbers are in ${adapterDir}`);

for (const n of heldOut) {
  const before = await trainer.model.generate(question(n), { adapter: null });
  const after = await trainer.model.generate(question(n));
  console.log(`Double ${n}: the base says ${before}, the adapter ${after}`);
}
