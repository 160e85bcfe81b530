/**
 * Stops a training run in its middle and goes on with it, as another process would after a crash or a restart.
 *
 *   node dist/examples/stop-and-resume.js [output folder]
 */
import { rm } from 'node:fs/promises';
import { QLoRATrainer, type TrainerOptions } from '../lib/index.js';

const [outputDir = 'demo-output/stop-and-resume'] = process.argv.slice(2);
await rm(outputDir, { recursive: true, force: true });

const options: TrainerOptions = {
  model: 'examples/demo/model',
  dataset: Array.from({ length: 48 }, (_, n) => ({ instruction: `Double ${n}.`, output: String(2 * n) })),
  outputDir,
  lora: { r: 8, alpha: 8, dropout: 0.05 },
  batchSize: 8,
  gradientAccumulationSteps: 1,
  maxSteps: 18,
  learningRate: 4e-3,
  lrScheduler: 'cosine',
  // A crash costs at most the steps since the last checkpoint; a stop costs only the step in progress.
  saveSteps: 5,
  saveTotalLimit: 2,
};

{
  await using trainer = await QLoRATrainer.create(options);
  const run = trainer.train();
  for await (const event of run) {
    if (event.type === 'checkpoint') console.log(`saved ${event.path.slice(outputDir.length + 1)}`);
    // Leaving the loop would stop it as well, and so does an AbortSignal: trainer.train({ signal }).
    if (event.type === 'step' && event.step === 8) run.stop();
  }
  const { steps, stopped } = await run;
  console.log(`${stopped ? 'stopped' : 'ended'} after ${steps} steps`);
}

// The same options, the same rows: weights, optimizer, schedule and order go on as if nothing had happened.
await using trainer = await QLoRATrainer.create(options);
const run = trainer.train({ resume: true });
let first: number | undefined;
for await (const event of run) {
  if (event.type === 'step') first ??= event.step;
}
const { steps, finalLoss } = await run;
console.log(`went on with step ${first}, ended after ${steps} with loss ${finalLoss.toFixed(3)}`);
