/** Quantizing and dequantizing a layer in NF4 with double quantization, as loading does; share of what memory allows. */
import { cast } from '../lib/ops/elementwise.js';
import { dequantizeWeight, quantizeWeight } from '../lib/ops/quantize.js';
import type { Weight } from '../lib/ops/weight.js';
import { bytesPerElement, Stream } from '../lib/tensor.js';
import { column, count, defineBench, percent, rounded } from './bench.js';
import { filled } from './matmul.js';
import { measureRoofline } from './roofline.js';

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

export default defineBench({
  name: 'quantize',
  about: 'a square layer to NF4 with double quantization and back; share of reading it once from memory',
  options: { size: { type: 'string', default: '4096' } },
  columns: [
    column('dtype', 5, 'dtype'),
    column('size', 6, 'size'),
    column('ms quantize', 11, 'msQuantize', 2),
    column('ms dequantize', 13, 'msDequantize', 2),
    column('Gweights/s', 10, 'gigaWeightsPerSecond', 2),
    percent('share', 'share'),
  ],
  async run(values, emit) {
    const size = count('size', values.size);
    const roofline = await measureRoofline();
    const stream = new Stream();
    using narrow = filled(stream, [size, size]);
    using wide = cast(undefined, narrow, 'f32');
    for (const x of [narrow, wide]) {
      let weight: Weight | undefined;
      const msQuantize = await best(async () => {
        weight?.dispose();
        weight = await quantizeWeight(x, { type: 'nf4', blockSize: 64, doubleQuant: true });
      });
      const msDequantize = await best(async () => {
        dequantizeWeight(weight as Weight, 'bf16').dispose();
        await stream.sync();
      });
      weight?.dispose();
      const floorMs = (size * size * bytesPerElement[x.dtype]) / roofline.readGigabytesPerSecond / 1e6;
      emit({
        dtype: x.dtype,
        size,
        msQuantize: rounded(msQuantize),
        msDequantize: rounded(msDequantize),
        gigaWeightsPerSecond: rounded((size * size) / msQuantize / 1e6),
        share: rounded(floorMs / msQuantize),
        ...roofline,
      });
    }
    await stream.close();
  },
});
