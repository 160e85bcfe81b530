/**
 * Fine-tunes the demo's model on a CSV file with the columns instruction, input and output, and asks it.
 *
 *   node dist/examples/train-on-csv.js [file] [output folder]
 */
import { QLoRATrainer } from '../lib/index.js';

const [file = 'examples/data/numbers.csv', outputDir = 'demo-output/train-on-csv'] = process.argv.slice(2);

await using trainer = await QLoRATrainer.create({
  model: 'examples/demo/model',
  // A path is all it takes: the kind of file and its columns are found out, and shown by the report.
  dataset: file,
  outputDir,
  lora: { r: 16, alpha: 16 },
  // A handful of rows: each of them in each step, thirty times.
  batchSize: 16,
  gradientAccumulationSteps: 1,
  epochs: 30,
  learningRate: 4e-3,
});

// Before anything is trained: what does a row become? The trained part is in brackets.
const row = { instruction: 'Write as a number, in digits.', input: 'twelve', output: '12' };
const { tokens, trained } = await trainer.explain(row);
console.log(tokens.map((token, i) => (trained[i] ? `[${token}]` : token)).join(''));

const { steps, finalLoss } = await trainer.train();
console.log(`after ${steps} steps the loss is ${finalLoss.toFixed(3)}`);

const { instruction, input } = row;
console.log(`the base: ${await trainer.model.generate({ instruction, input }, { adapter: null })}`);
console.log(`with the adapter: ${await trainer.model.generate({ instruction, input })}`);
console.log(`the curves are in ${outputDir}/report.html`);
