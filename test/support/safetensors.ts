/** A plain reader of safetensors files, for references: trusts them, and shares nothing with the library's. */
import { readFileSync } from 'node:fs';

const arrayTypes = {
  F32: Float32Array,
  F64: Float64Array,
  BF16: Uint16Array,
  F16: Uint16Array,
  I64: BigInt64Array,
  I32: Int32Array,
  I8: Int8Array,
  U8: Uint8Array,
};
type Arrays = { [D in keyof typeof arrayTypes]: InstanceType<(typeof arrayTypes)[D]> };

export interface StoredTensor {
  dtype: keyof Arrays;
  shape: number[];
  /** 16-bit floats as their bits. */
  data: Arrays[keyof Arrays];
}

export function readSafetensors(path: string): Map<string, StoredTensor> {
  const file = readFileSync(path);
  const start = 8 + Number(file.readBigUInt64LE(0));
  const header = JSON.parse(file.toString('utf8', 8, start)) as Record<
    string,
    { dtype: keyof Arrays; shape: number[]; data_offsets: [number, number] }
  >;
  const tensors = new Map<string, StoredTensor>();
  for (const [name, entry] of Object.entries(header)) {
    if (name === '__metadata__') continue;
    const [begin, end] = entry.data_offsets;
    const bytes = new Uint8Array(file.subarray(start + begin, start + end)); // a copy, so that it is aligned
    tensors.set(name, { dtype: entry.dtype, shape: entry.shape, data: new arrayTypes[entry.dtype](bytes.buffer) });
  }
  return tensors;
}

const word = new Uint32Array(1);
const float = new Float32Array(word.buffer);

function widenHalf(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const [exponent, mantissa] = [(bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return mantissa ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return sign * (exponent ? (1024 + mantissa) * 2 ** (exponent - 25) : mantissa * 2 ** -24);
}

/** The values of a floating-point tensor of up to 32 bits. */
export function valuesOf({ dtype, data }: StoredTensor): Float32Array {
  if (data instanceof Float32Array) return data;
  if (dtype !== 'BF16' && dtype !== 'F16') throw new Error(`no floating-point tensor of up to 32 bits: ${dtype}`);
  return Float32Array.from(data as Uint16Array, (bits) => {
    if (dtype === 'F16') return widenHalf(bits);
    word[0] = bits << 16;
    return float[0] as number;
  });
}
