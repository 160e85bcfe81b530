import { readFileSync } from 'node:fs';

export interface ReferenceTensor {
  shape: number[];
  data: Float32Array;
}

/** The fp32 tensors of a file that another library wrote, read without the code under test. */
export function readReferenceTensors(path: string): (name: string) => ReferenceTensor {
  const bytes = readFileSync(path);
  const start = 8 + Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.toString('utf8', 8, start)) as Record<
    string,
    { dtype: string; shape: number[]; data_offsets: [number, number] }
  >;
  return (name) => {
    const entry = header[name];
    if (entry?.dtype !== 'F32') throw new Error(`${path} has no F32 tensor ${name}`);
    const [begin, end] = entry.data_offsets;
    return { shape: entry.shape, data: new Float32Array(bytes.buffer.slice(start + begin, start + end)) };
  };
}
