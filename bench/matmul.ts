/**
 * 4-bit matmul (NF4, blocks of 64, double quantization) in bf16, forward and backward.
 *
 * `share` is of the bound that is nearer: multiply-adds, or reading the weight once from memory. The weights rotate
 * through layers that no cache holds; with `--layers one` the same is used again and again, and may come from a cache.
 * `--m 1,512` and `--shape 2048x5632` (inputs x outputs) choose; `--lora 16` adds an adapter, whose work then counts;
 * `loraCost` is what it adds to the time over its share of the multiply-adds, 1 where both are in proportion.
 */
import { quantizeWeight } from '../lib/ops/quantize.js';
import type { Weight } from '../lib/ops/weight.js';
import { Stream, Tensor } from '../lib/tensor.js';
import { amount, choice, column, counts, defineBench, percent, rounded } from './bench.js';
import { cacheBytes } from './machine.js';
import { measureRoofline } from './roofline.js';
import { differenceMs, leastMs } from './timing.js';

/** Signs, and magnitudes of a few powers of two: what they are does not change the time. */
export function filled(stream: Stream, shape: readonly number[]): Tensor {
  const size = shape.reduce((n, d) => n * d, 1);
  const bits = new Uint16Array(size);
  for (let i = 0, state = 1; i < size; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    bits[i] = ((state >>> 16) & 0x8000) | (0x3c00 + ((state >>> 12) & 0x1ff));
  }
  const tensor = new Tensor(stream, 'bf16', shape);
  tensor.write(bits).catch(() => {});
  return tensor;
}

export default defineBench({
  name: 'matmul',
  about: '4-bit weights (NF4, double quantization), bf16; share of the multiply-adds or of reading the weight',
  options: {
    m: { type: 'string', default: '1,4,16,64,256,1024,2048' },
    shape: { type: 'string', default: '4096x4096,2048x5632' },
    lora: { type: 'string', default: '0' },
    seconds: { type: 'string', default: '0.7' },
    layers: { type: 'string', default: 'many' },
  },
  columns: [
    column('M', 5, 'm'),
    column('N', 6, 'n'),
    column('K', 6, 'k'),
    column('direction', 9, 'direction'),
    column('ms', 9, 'ms', 3),
    percent('share', 'share'),
    column('loraCost', 8, 'loraCost', 2),
  ],
  async run(values, emit) {
    const rank = amount('lora', values.lora);
    const seconds = amount('seconds', values.seconds);
    const ms = counts('m', values.m);
    const bytes = choice('layers', values.layers, ['many', 'one']) === 'many' ? 3 * cacheBytes() : 1;
    const roofline = await measureRoofline();
    const stream = new Stream();
    for (const shape of values.shape.split(',')) {
      const [K, N] = counts('shape', shape.replace('x', ',')) as [number, number];
      const layers = await quantizedLayers(stream, N, K, bytes);
      const [A, B, dA, dB] = [0, 1, 2, 3].map((i) => {
        const size = i % 2 ? [N, rank || 1] : [rank || 1, K];
        return Tensor.from(stream, new Float32Array((size[0] as number) * (size[1] as number)).fill(0.01), size);
      });
      for (const m of ms) {
        using x = filled(stream, [m, K]);
        using dy = filled(stream, [m, N]);
        using y = new Tensor(stream, 'bf16', [m, N]);
        using dx = new Tensor(stream, 'bf16', [m, K]);
        using t = new Tensor(stream, 'bf16', [m, rank || 1]);
        const layer = (i: number) => layers[i % layers.length] as Weight;
        // Scale, dropout, and the seed and stream of its mask.
        const adapter = [2, 0, 0, 0];
        const forward = (i: number) => stream.run('matmulForward', x, ...layer(i).args, null, y);
        const backward = (i: number) => stream.run('matmulBackward', dy, ...layer(i).args, dx);
        const loraForward = (i: number) =>
          stream.run('loraLinearForward', x, ...layer(i).args, null, A, B, y, t, ...adapter);
        const loraBackward = (i: number) =>
          stream.run('loraLinearBackward', dy, x, ...layer(i).args, A, B, t, dx, dA, dB, ...adapter);
        const base = 2 * m * N * K;
        const extra = 2 * m * rank * (N + K);
        for (const [direction, plain, withAdapter, added] of [
          ['forward', forward, loraForward, extra],
          ['backward', backward, loraBackward, 2 * extra],
        ] as const) {
          const ms = await leastMs(stream, seconds, rank ? withAdapter : plain);
          const flop = base + added;
          const lora = rank && {
            lora: rank,
            loraCost: rounded(
              (await differenceMs(stream, seconds, plain, withAdapter)) /
                (await leastMs(stream, seconds, plain)) /
                (added / base),
            ),
          };
          const { rooflineGflops, readGigabytesPerSecond } = roofline;
          const floorMs = Math.max(flop / rooflineGflops, layer(0).sizeBytes / readGigabytesPerSecond) / 1e6;
          const share = rounded(floorMs / ms);
          emit({ m, n: N, k: K, ...lora, direction, ms: rounded(ms), share, ...roofline });
        }
      }
      for (const weight of layers) weight.dispose();
      for (const tensor of [A, B, dA, dB]) tensor?.dispose();
    }
    await stream.close();
  },
});

/** As many as take `bytes` together. */
async function quantizedLayers(stream: Stream, N: number, K: number, bytes: number): Promise<Weight[]> {
  using dense = filled(stream, [N, K]);
  const layers: Weight[] = [];
  for (let total = 0; total < bytes; total += layers[0]?.sizeBytes ?? bytes) {
    layers.push(await quantizeWeight(dense, { type: 'nf4', blockSize: 64, doubleQuant: true }));
  }
  return layers;
}
