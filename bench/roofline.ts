/** What the machine can do: multiply-adds from registers, and reading from memory, on all threads. */
import { pathToFileURL } from 'node:url';
import { dtypeIndex } from '../lib/ops/weight.js';
import { type FloatDType, Stream, Tensor } from '../lib/tensor.js';
import { machineFields } from './machine.js';

export interface RooflineRates {
  /** Of the multiply-adds that a matmul of the compute dtype uses. */
  gflops: number;
  gigabytesPerSecond: number;
}

/** The best of many short tries, so that other work on the machine counts little; takes about a second. */
export async function measureRoofline(dtype: FloatDType = 'bf16'): Promise<RooflineRates> {
  const stream = new Stream();
  const rates = new Tensor(stream, 'f32', [2], 'scratch');
  stream.run('roofline', rates, dtypeIndex[dtype]);
  const [gflops, gigabytesPerSecond] = (await rates.read()) as Float32Array;
  await stream.close();
  return { gflops: gflops as number, gigabytesPerSecond: gigabytesPerSecond as number };
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  for (const dtype of ['bf16', 'f32'] as const) {
    const rates = await measureRoofline(dtype);
    const result = {
      bench: 'roofline',
      ...machineFields(),
      dtype,
      gflops: Number(rates.gflops.toFixed(1)),
      gigabytesPerSecond: Number(rates.gigabytesPerSecond.toFixed(1)),
    };
    console.log(JSON.stringify(result));
  }
}
