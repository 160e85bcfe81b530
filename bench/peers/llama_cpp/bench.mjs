// Prefill and greedy decoding of llama.cpp through node-llama-cpp, on the CPU: one JSON line.
//   node bench.mjs model.gguf [--threads 2] [--prompt 512] [--new 128]

import { performance } from 'node:perf_hooks';
import { parseArgs } from 'node:util';
import { getLlama } from 'node-llama-cpp';

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    threads: { type: 'string', default: '2' },
    prompt: { type: 'string', default: '512' },
    new: { type: 'string', default: '128' },
  },
});
const threads = Number(values.threads);
const promptLength = Number(values.prompt);
const newTokens = Number(values.new);

const began = performance.now();
const llama = await getLlama({ gpu: false, maxThreads: threads, build: 'never' });
const model = await llama.loadModel({ modelPath: positionals[0] });
const loadSeconds = (performance.now() - began) / 1e3;
const context = await model.createContext({
  contextSize: promptLength + newTokens + 64,
  batchSize: promptLength,
  threads,
});
const sequence = context.getSequence();
const tokens = Array.from({ length: promptLength }, (_, i) => 300 + ((i * 7919) % 30000));

async function prefill() {
  await sequence.clearHistory();
  const start = performance.now();
  await sequence.evaluateWithoutGeneratingNewTokens(tokens);
  return promptLength / ((performance.now() - start) / 1e3);
}
await prefill();
const prefills = [await prefill(), await prefill(), await prefill()];

await sequence.clearHistory();
await sequence.evaluateWithoutGeneratingNewTokens(tokens.slice(0, 64));
let count = 0;
let start = 0;
for await (const _ of sequence.evaluate([301], { temperature: 0, yieldEogToken: true })) {
  if (count === 0) start = performance.now();
  if (++count > newTokens) break;
}
const decode = newTokens / ((performance.now() - start) / 1e3);
console.log(
  JSON.stringify({
    bench: 'llama.cpp',
    model: positionals[0].split('/').pop(),
    threads,
    prefill_tokens_per_second: +prefills.sort((a, b) => a - b)[1].toFixed(1),
    decode_tokens_per_second: +decode.toFixed(1),
    load_seconds: +loadSeconds.toFixed(2),
    peak_rss_mb: Math.round(process.resourceUsage().maxRSS / 1024),
  }),
);
process.exit(0);
