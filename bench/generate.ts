/**
 * Greedy decoding and prefill at batch 1: one JSON line.
 *
 *     npm run bench -- generate --model FOLDER [--adapter]
 *
 * decodeTokensPerSecond is --new tokens over (time of --new + 1 tokens) - (time of 1 token), after a prompt of --prompt
 * tokens; prefillTokensPerSecond is --prefill prompt tokens over the time of one new token after them. Medians.
 */
import { parseArgs } from 'node:util';
import { QuantizedModel } from '../lib/index.js';
import { machineFields, median, peakRssBytes } from './machine.js';
import { measureRoofline } from './roofline.js';

const { values } = parseArgs({
  options: {
    model: { type: 'string' },
    adapter: { type: 'boolean', default: false },
    r: { type: 'string', default: '16' },
    prompt: { type: 'string', default: '64' },
    new: { type: 'string', default: '128' },
    prefill: { type: 'string', default: '512' },
    runs: { type: 'string', default: '3' },
    json: { type: 'boolean', default: true },
  },
});
if (!values.model) throw new Error('generate: --model FOLDER is missing');
const [promptLength, newTokens, prefillLength, runs] = [values.prompt, values.new, values.prefill, values.runs].map(
  Number,
) as [number, number, number, number];

const began = performance.now();
await using model = await QuantizedModel.load(values.model);
const loadSeconds = (performance.now() - began) / 1000;
if (values.adapter) model.addLora('bench', { r: Number(values.r), alpha: Number(values.r) });

const ids = (length: number) => Array.from({ length }, (_, i) => (i * 7919 + 13) % model.core.config.vocabSize);
async function seconds(length: number, maxNewTokens: number): Promise<number> {
  const start = performance.now();
  const made = await model.generateTokens(ids(length), { maxNewTokens, doSample: false, ignoreEos: true });
  if (made.length !== maxNewTokens) throw new Error(`${made.length} tokens came, ${maxNewTokens} were asked for`);
  return (performance.now() - start) / 1000;
}

await seconds(promptLength, 2);
await seconds(prefillLength, 1);
const decode: number[] = [];
const prefill: number[] = [];
for (let i = 0; i < runs; i++) {
  decode.push(newTokens / ((await seconds(promptLength, newTokens + 1)) - (await seconds(promptLength, 1))));
  prefill.push(prefillLength / (await seconds(prefillLength, 1)));
}
const roofline = await measureRoofline();
const { weights, config } = model.core;
// Each token reads every linear layer and the output head once.
const { head } = weights.decoder;
const bytesPerToken = weights.linears.reduce((sum, { weight }) => sum + weight.sizeBytes, head.sizeBytes);
const decodeTokensPerSecond = median(decode);
console.log(
  JSON.stringify({
    bench: 'generate',
    ...machineFields(),
    model: values.model.replace(/\/+$/, '').split('/').at(-1),
    adapter: values.adapter,
    layers: config.numLayers,
    loadSeconds,
    decodeTokensPerSecond,
    prefillTokensPerSecond: median(prefill),
    bytesPerToken,
    readGigabytesPerSecond: roofline.gigabytesPerSecond,
    share: (decodeTokensPerSecond * bytesPerToken) / (roofline.gigabytesPerSecond * 1e9),
    peakRssBytes: peakRssBytes(),
  }),
);
