/**
 * Training steps of LoRA over a 4-bit base: one JSON line with load time, tokens/s, peak memory, the delay of the event
 * loop, and the share of the machine's matrix peak that the step's arithmetic reaches.
 *
 *     npm run bench -- train --model FOLDER --batch 1 --sequence 512 --checkpointing off
 *
 * Every token is random and a target. A step is forward, backward and AdamW over the adapter, r 16 on all linear layers.
 */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { monitorEventLoopDelay } from 'node:perf_hooks';
import { parseArgs } from 'node:util';
import { QLoRATrainer, QuantizedModel } from '../lib/index.js';
import { machineFields, median, peakRssBytes } from './machine.js';
import { measureRoofline } from './roofline.js';

const { values } = parseArgs({
  options: {
    model: { type: 'string' },
    batch: { type: 'string', default: '1' },
    sequence: { type: 'string', default: '512' },
    checkpointing: { type: 'string', default: 'off' },
    steps: { type: 'string', default: '4' },
    r: { type: 'string', default: '16' },
    json: { type: 'boolean', default: true },
  },
});
if (!values.model) throw new Error('train: --model FOLDER is missing');
const [batch, sequence, steps, r] = [values.batch, values.sequence, values.steps, values.r].map(Number) as [
  number,
  number,
  number,
  number,
];
const gradientCheckpointing = values.checkpointing === 'on';

/** FLOP a token: the floors of a step, without recomputation of what the tape keeps. */
function flopPerToken(model: QuantizedModel): number {
  const { linears } = model.core.weights;
  const { config } = model.core;
  const P = linears.reduce((sum, { weight }) => sum + weight.N * weight.K, 0);
  const dV = config.hiddenSize * config.vocabSize;
  const attention = 2 * sequence * config.numHeads * config.headDim * config.numLayers;
  const adapters = linears.reduce((sum, { weight }) => sum + r * (weight.N + weight.K), 0);
  const backward = 2 * P + 2 * dV + 2.5 * attention + 4 * adapters;
  const forward = 2 * P + 2 * dV + attention + 2 * adapters;
  return forward + backward + (gradientCheckpointing ? 2 * P + attention + 2 * adapters : 0);
}

const outputDir = mkdtempSync(join(tmpdir(), 'qlora-bench-'));
const began = performance.now();
await using model = await QuantizedModel.load(values.model);
const loadSeconds = (performance.now() - began) / 1000;
const loadPeakRssBytes = peakRssBytes();

let seed = 1;
const random = () => {
  seed = (Math.imul(seed, 1103515245) + 12345) & 0x7fffffff;
  return seed % model.core.config.vocabSize;
};
const rows = Array.from({ length: batch }, () => ({ inputIds: Array.from({ length: sequence }, random) }));
// The peak of training alone, where the kernel lets a process restart it.
try {
  writeFileSync('/proc/self/clear_refs', '5');
} catch {}
await using trainer = await QLoRATrainer.create({
  model,
  dataset: rows,
  outputDir,
  lora: { r, alpha: 16 },
  batchSize: batch,
  gradientAccumulationSteps: 1,
  gradientCheckpointing,
});
await trainer.trainStep(rows);
const delay = monitorEventLoopDelay({ resolution: 1 });
delay.enable();
const seconds: number[] = [];
const losses: number[] = [];
for (let i = 0; i < steps; i++) {
  const start = performance.now();
  losses.push((await trainer.trainStep(rows)).loss);
  seconds.push((performance.now() - start) / 1000);
}
delay.disable();
const peak = peakRssBytes();
const tokensPerSecond = (batch * sequence) / median(seconds);
const roofline = await measureRoofline();
const flop = flopPerToken(model);
console.log(
  JSON.stringify({
    bench: 'train',
    ...machineFields(),
    model: values.model.replace(/\/+$/, '').split('/').at(-1),
    batch,
    sequence,
    checkpointing: values.checkpointing,
    r,
    loadSeconds,
    loadPeakRssBytes,
    tokensPerSecond,
    millisecondsPerStep: seconds.map((s) => Math.round(s * 1000)),
    peakRssBytes: peak,
    countedPeakBytes: model.memory().peakBytes,
    gflopPerToken: flop / 1e9,
    rooflineGflops: roofline.gflops,
    share: (tokensPerSecond * flop) / (roofline.gflops * 1e9),
    eventLoopDelayMs: { p50: delay.percentile(50) / 1e6, p99: delay.percentile(99) / 1e6, max: delay.max / 1e6 },
    loss: losses,
  }),
);
rmSync(outputDir, { recursive: true });
