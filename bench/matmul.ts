/**
 * 4-bit matmul (NF4, blocks of 64, double quantization) in bf16, forward and backward: one JSON line a measurement.
 *
 * `share` is of the bound that is nearer: multiply-adds, or reading the weight once from memory. The weights rotate
 * through layers that no cache holds. `--m 1,512` and `--shape 4096x4096` choose; `--lora 16` adds an adapter, whose
 * work then counts.
 */
import { parseArgs } from 'node:util';
import { quantizeWeight } from '../lib/ops/quantize.js';
import type { Weight } from '../lib/ops/weight.js';
import { Stream, Tensor } from '../lib/tensor.js';
import { machineFields } from './machine.js';
import { measureRoofline } from './roofline.js';

const { values } = parseArgs({
  options: {
    m: { type: 'string', default: '1,4,16,64,256,1024,2048' },
    shape: { type: 'string', default: '4096x4096,2048x5632' },
    lora: { type: 'string', default: '0' },
    json: { type: 'boolean' },
  },
});
const rank = Number(values.lora);
const cacheBytes = 80e6;
const secondsEach = 1;

const stream = new Stream();
const rates = await measureRoofline('bf16');
const machine = machineFields();

/** Signs, and magnitudes of a few powers of two: what they are does not change the time. */
function filled(shape: readonly number[]): Tensor {
  const size = shape.reduce((n, d) => n * d, 1);
  const bits = Uint16Array.from(
    { length: size },
    () => (Math.random() < 0.5 ? 0x8000 : 0) | (0x3c00 + Math.random() * 0x200),
  );
  const tensor = new Tensor(stream, 'bf16', shape, 'activations');
  tensor.write(bits).catch(() => {});
  return tensor;
}

/** The least of enough runs, in milliseconds. `enqueue(i)` makes run i; a run is long enough that its end is seen late. */
async function leastMs(enqueue: (i: number) => void): Promise<number> {
  let least = Number.POSITIVE_INFINITY;
  const end = performance.now() + secondsEach * 1000;
  let i = 0;
  // Several calls between two waits, so that what a wait costs does not count.
  let calls = 1;
  while (performance.now() < end || i < 3 * calls) {
    const start = performance.now();
    for (let c = 0; c < calls; c++) enqueue(i++);
    await stream.sync();
    const ms = performance.now() - start;
    least = Math.min(least, ms / calls);
    if (ms < 10) calls = Math.min(64, calls * 2);
  }
  return least;
}

for (const shape of values.shape.split(',')) {
  const [N, K] = shape.split('x').map(Number) as [number, number];
  const layers: Weight[] = [];
  for (let i = 0; i < Math.ceil(cacheBytes / ((N * K) / 2)); i++) {
    using dense = filled([N, K]);
    layers.push(await quantizeWeight(dense, { type: 'nf4', blockSize: 64, doubleQuant: true }));
  }
  const [A, B, dA, dB] = [0, 1, 2, 3].map((i) => {
    const matrix = new Tensor(stream, 'f32', i % 2 ? [N, rank || 1] : [rank || 1, K]);
    matrix.write(new Float32Array(matrix.size).fill(0.01)).catch(() => {});
    return matrix;
  });
  for (const m of values.m.split(',').map(Number)) {
    using x = filled([m, K]);
    using dy = filled([m, N]);
    using y = new Tensor(stream, 'bf16', [m, N]);
    using dx = new Tensor(stream, 'bf16', [m, K]);
    using t = new Tensor(stream, 'bf16', [m, rank || 1]);
    const layer = (i: number) => layers[i % layers.length] as Weight;
    // Scale, dropout, and the seed and stream of its mask.
    const adapter = [2, 0, 0, 0];
    const forward = (i: number) =>
      rank
        ? stream.run('loraLinearForward', x, ...layer(i).args, null, A, B, y, t, ...adapter)
        : stream.run('matmulForward', x, ...layer(i).args, null, y);
    const backward = (i: number) =>
      rank
        ? stream.run('loraLinearBackward', dy, x, ...layer(i).args, A, B, t, dx, dA, dB, ...adapter)
        : stream.run('matmulBackward', dy, ...layer(i).args, dx);
    const extra = 2 * m * rank * (N + K);
    for (const [direction, enqueue, flop] of [
      ['forward', forward, 2 * m * N * K + extra],
      ['backward', backward, 2 * m * N * K + 2 * extra],
    ] as const) {
      const ms = await leastMs(enqueue);
      const floorMs = Math.max(flop / rates.gflops / 1e6, (layer(0).sizeBytes / rates.gigabytesPerSecond) * 1e-6);
      const result = {
        bench: 'matmul',
        ...machine,
        m,
        n: N,
        k: K,
        ...(rank && { lora: rank }),
        direction,
        ms: Number(ms.toFixed(4)),
        share: Number((floorMs / ms).toFixed(3)),
      };
      console.log(JSON.stringify(result));
    }
  }
  for (const weight of layers) weight.dispose();
}
await stream.close();
