/**
 * One base in memory, several adapters over it: each is trained on rows of its own, and each call says whom it asks.
 *
 *   node dist/examples/several-adapters.js [output folder]
 */
import { join } from 'node:path';
import { QLoRATrainer, QuantizedModel, type Row } from '../lib/index.js';

const [outputDir = 'demo-output/several-adapters'] = process.argv.slice(2);

/** The same questions, answered in two ways. What is asked at the end is in no row. */
const asked = [21, 8];
const numbers = Array.from({ length: 32 }, (_, n) => n).filter((n) => !asked.includes(n));
const skills: Record<string, (n: number) => string> = {
  double: (n) => String(2 * n),
  next: (n) => String(n + 1),
};
const question = (n: number) => ({ instruction: `What comes of ${n}?` });

// 1.7 million weights in 4 bits, loaded once.
await using model = await QuantizedModel.load('examples/demo/model');
const ask = (n: number, adapter: string | null) => model.generate(question(n), { adapter, maxNewTokens: 8 });
const before = await Promise.all(asked.map((n) => ask(n, null)));

for (const [name, answer] of Object.entries(skills)) {
  const rows: Row[] = numbers.map((n) => ({ ...question(n), output: answer(n) }));
  await using trainer = await QLoRATrainer.create({
    model,
    dataset: rows,
    outputDir: join(outputDir, name),
    lora: { r: 16, alpha: 16 },
    batchSize: 16,
    gradientAccumulationSteps: 1,
    maxSteps: 24,
    learningRate: 4e-3,
  });
  const { adapterDir, finalLoss } = await trainer.train();
  // What was trained is called 'default'. It makes room for the next, and comes back from disk under its own name.
  model.removeLora('default');
  await model.loadLora(name, adapterDir as string);
  console.log(`${name}: loss ${finalLoss.toFixed(3)}, ${model.adapters.size} loaded`);
}

// At the same time, over the same weights. null is the base alone, which never learnt what the question means: it guesses,
// now and then one of the adapters' answers, and as it guessed before there were adapters.
for (const [i, n] of asked.entries()) {
  const [double, next, base] = await Promise.all([ask(n, 'double'), ask(n, 'next'), ask(n, null)]);
  const as = base === before[i] ? 'as before any training' : `before any training ${before[i]}`;
  console.log(`What comes of ${n}? double: ${double}, next: ${next}, the base guesses ${base}, ${as}`);
}
