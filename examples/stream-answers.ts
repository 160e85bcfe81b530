/**
 * Loads the demo's model in 4 bits and streams answers: greedy, sampled with a seed, and of a conversation.
 *
 *   node dist/examples/stream-answers.js
 */
import { type ChatMessage, QuantizedModel } from '../lib/index.js';

await using model = await QuantizedModel.load('examples/demo/model');
const { liveBytes } = model.memory();
console.log(`loaded on ${model.device}, ${(liveBytes / 1e6).toFixed(1)} MB`);

/** What generate() returns can be iterated for pieces of text as they come. */
async function show(label: string, pieces: AsyncIterable<string>): Promise<void> {
  process.stdout.write(`${label} `);
  for await (const piece of pieces) process.stdout.write(piece);
  process.stdout.write('\n');
}

await show('12 + 30 =', model.generate({ instruction: 'What is 12 plus 30?' }));
await show('apple, three times:', model.generate({ instruction: 'Repeat the word 3 times.', input: 'apple' }));

const sampled = { doSample: true, temperature: 0.8, topP: 0.9, seed: 7, maxNewTokens: 8 };
await show('sampled:', model.generate({ instruction: 'What color is the sky?' }, sampled));

const messages: ChatMessage[] = [{ role: 'user', content: 'What is the opposite of hot?' }];
await show('hot, turned around:', model.generate(messages, { stop: ['\n'] }));

// Awaited instead of iterated it is the whole text; an aborted signal ends it with an AbortError.
const signal = AbortSignal.timeout(30_000);
console.log('digits of 407:', await model.generate({ instruction: 'Write the digits of 407 one by one.' }, { signal }));
