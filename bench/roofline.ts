/** What the machine can do: multiply-adds from registers, and reading from memory, on all threads. */
import { dtypeIndex, type FloatDType, Stream, Tensor } from '../lib/tensor.js';
import { column, defineBench, rounded } from './bench.js';

export interface RooflineFields {
  /** Of the multiply-adds that a matmul of the compute dtype uses. */
  rooflineGflops: number;
  readGigabytesPerSecond: number;
}

/** Rounds differ where other work slows the machine, or where one finds memory in a cache. */
const mostRounds = 5;
const agreement = 0.98;

/** The best that another round comes near to, or undefined. */
export function confirmedBest(rates: readonly number[]): number | undefined {
  const sorted = [...rates].sort((a, b) => b - a);
  return sorted.find((rate, i) => (sorted[i + 1] ?? 0) >= agreement * rate);
}

const secondBest = (rates: readonly number[]) => [...rates].sort((a, b) => b - a)[1] as number;

/** Rounds of about half a second, each the best of many short tries, until the best of both rates is confirmed. */
export async function measureRoofline(dtype: FloatDType = 'bf16'): Promise<RooflineFields> {
  const stream = new Stream();
  const rates = new Tensor(stream, 'f32', [2], 'scratch');
  const rounds: number[][] = [[], []];
  for (let round = 0; round < mostRounds && rounds.some((of) => confirmedBest(of) === undefined); round++) {
    stream.run('roofline', rates, dtypeIndex[dtype]);
    for (const [i, rate] of ((await rates.read()) as Float32Array).entries()) rounds[i]?.push(rate);
  }
  await stream.close();
  const [gflops, gigabytes] = rounds.map((of) => confirmedBest(of) ?? secondBest(of)) as [number, number];
  return { rooflineGflops: rounded(gflops), readGigabytesPerSecond: rounded(gigabytes) };
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
