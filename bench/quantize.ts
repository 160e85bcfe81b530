/** Quantizing and dequantizing a 4096 x 4096 layer in NF4 with double quantization, as loading does: one JSON line a path. */
import { native } from '../lib/native.js';
import { dequantizeWeight, quantizeWeight } from '../lib/ops/quantize.js';
import type { Weight } from '../lib/ops/weight.js';
import { Stream, Tensor } from '../lib/tensor.js';

const size = 4096;
const repeats = 9;

/** The best of several runs, in milliseconds. */
async function best(run: () => Promise<void>): Promise<number> {
  let least = Number.POSITIVE_INFINITY;
  for (let i = 0; i < repeats; i++) {
    const start = performance.now();
    await run();
    least = Math.min(least, performance.now() - start);
  }
  return least;
}

const stream = new Stream();
const bits = new Uint16Array(size * size);
// Signs and magnitudes from 2^-12 to 2^-4, all mantissas: the exponent in the upper half of a random word.
for (let i = 0; i < bits.length; i++) bits[i] = (Math.random() < 0.5 ? 0x8000 : 0) | (0x3980 + Math.random() * 0x400);
const { inUse, threads } = native.cpu();

for (const path of ['bf16', 'f32'] as const) {
  using narrow = new Tensor(stream, 'bf16', [size, size]);
  await narrow.write(bits);
  using wide = new Tensor(stream, 'f32', [size, size]);
  stream.run('dequantize', narrow, null, null, null, null, size, size, 0, 0, wide);
  const x = path === 'bf16' ? narrow : wide;
  let weight: Weight | undefined;
  const msQuantize = await best(async () => {
    weight?.dispose();
    weight = await quantizeWeight(x, { type: 'nf4', blockSize: 64, doubleQuant: true });
  });
  const msDequantize = await best(async () => {
    dequantizeWeight(weight as Weight, path).dispose();
    await stream.sync();
  });
  weight?.dispose();
  const result = {
    bench: 'quantize',
    cpu: inUse,
    threads,
    path,
    weights: size * size,
    msQuantize: Number(msQuantize.toFixed(3)),
    msDequantize: Number(msDequantize.toFixed(3)),
    gigaWeightsPerSecond: Number(((size * size) / msQuantize / 1e6).toFixed(3)),
  };
  console.log(JSON.stringify(result));
}
await stream.close();
