/**
 * Fine-tunes the demo's model on conversations. Every answer of the assistant is trained, what the user says is not.
 *
 *   node dist/examples/train-on-chats.js [output folder]
 */
import { type ChatMessage, QLoRATrainer, type Row } from '../lib/index.js';

const [outputDir = 'demo-output/train-on-chats'] = process.argv.slice(2);

/** Two turns each: a greeting that is always the same, then the name backwards. */
const names = ['Ada', 'Alan', 'Grace', 'Edsger', 'Barbara', 'Donald', 'Radia', 'Linus'];
const backwards = (name: string) => name.toLowerCase().split('').reverse().join('');
const conversation = (name: string): ChatMessage[] => [
  { role: 'user', content: `I am ${name}.` },
  { role: 'assistant', content: `Hello ${name}!` },
  { role: 'user', content: 'Spell my name backwards.' },
  { role: 'assistant', content: backwards(name) },
];
const dataset: Row[] = names.map((name) => ({ messages: conversation(name) }));

await using trainer = await QLoRATrainer.create({
  model: 'examples/demo/model',
  dataset,
  outputDir,
  // Conversations go through the model's own chat template; maskHistory would train the last answer only.
  maskHistory: false,
  lora: { r: 16, alpha: 16 },
  batchSize: 8,
  gradientAccumulationSteps: 1,
  maxSteps: 40,
  learningRate: 4e-3,
});

const run = trainer.train();
for await (const event of run) {
  if (event.type === 'step' && event.step % 10 === 0) console.log(`step ${event.step}: loss ${event.loss.toFixed(3)}`);
}

// Ask in the form that it was trained in: messages, and each answer becomes part of what is asked next.
const messages: ChatMessage[] = [];
for (const content of ['I am Grace.', 'Spell my name backwards.']) {
  messages.push({ role: 'user', content });
  const answer = await trainer.model.generate(messages, { maxNewTokens: 16 });
  messages.push({ role: 'assistant', content: answer });
  console.log(`${content} -> ${answer}`);
}
