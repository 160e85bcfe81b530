/** What the machine can do: multiply-adds from registers, and reading from memory, on all threads. */
import { dtypeIndex, type FloatDType, Stream, Tensor } from '../lib/tensor.js';
import { column, defineBench, rounded } from './bench.js';

export interface RooflineFields {
  /** Of the multiply-adds that a matmul of the compute dtype uses. */
  rooflineGflops: number;
  readGigabytesPerSecond: number;
}

/** The best of many short tries, so that other work on the machine counts little; takes about a second. */
export async function measureRoofline(dtype: FloatDType = 'bf16'): Promise<RooflineFields> {
  const stream = new Stream();
  const rates = new Tensor(stream, 'f32', [2], 'scratch');
  stream.run('roofline', rates, dtypeIndex[dtype]);
  const [gflops, gigabytes] = (await rates.read()) as Float32Array;
  await stream.close();
  return { rooflineGflops: rounded(gflops as number), readGigabytesPerSecond: rounded(gigabytes as number) };
}

export default defineBench({
  name: 'roofline',
  about: 'multiply-adds from registers and reads from memory, the bounds of all that follows',
  options: {},
  columns: [
    column('dtype', 5, 'dtype'),
    column('GFLOP/s', 8, 'rooflineGflops', 1),
    column('GB/s read', 9, 'readGigabytesPerSecond', 1),
  ],
  async run(_, emit) {
    for (const dtype of ['bf16', 'f32'] as const) emit({ dtype, ...(await measureRoofline(dtype)) });
  },
});
