/** The arithmetic of bitsandbytes' formats, element by element: what the kernels are compared with. */

const f = Math.fround;
const smallestAbsmax = f(1e-38);

// Rising magnitudes' codes, and the thresholds on |x| between them.
const fp4Codes = [0, 1, 6, 7, 4, 5, 2, 3];
const fp4Thresholds = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333].map(f);

/** v * (1 / absmax), block by block. */
function scaled(v: Float32Array, blockSize: number): { x: Float32Array; absmax: Float32Array } {
  const x = new Float32Array(v.length);
  const absmax = new Float32Array(Math.ceil(v.length / blockSize));
  for (let b = 0; b < absmax.length; b++) {
    const block = v.subarray(b * blockSize, (b + 1) * blockSize);
    const top = block.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    const inverse = f(1 / Math.max(top, smallestAbsmax));
    absmax[b] = top;
    for (let i = 0; i < block.length; i++) x[b * blockSize + i] = f((block[i] as number) * inverse);
  }
  return { x, absmax };
}

/** How many of the thresholds lie below x. */
function rank(x: number, thresholds: ArrayLike<number>): number {
  let count = 0;
  for (let i = 0; i < thresholds.length; i++) if (x > (thresholds[i] as number)) count++;
  return count;
}

export function quantize4bitReference(
  v: Float32Array,
  type: 'nf4' | 'fp4',
  blockSize: number,
  nf4: Float32Array,
): { packed: Uint8Array; absmax: Float32Array } {
  const { x, absmax } = scaled(v, blockSize);
  const nf4Thresholds = Array.from({ length: 15 }, (_, i) => f(((nf4[i] as number) + (nf4[i + 1] as number)) / 2));
  const codeOf = (value: number): number => {
    if (type === 'nf4') return rank(value, nf4Thresholds);
    return (fp4Codes[rank(Math.abs(value), fp4Thresholds)] as number) + (value < 0 ? 8 : 0);
  };
  const packed = new Uint8Array(Math.ceil(v.length / 2));
  for (let i = 0; i < packed.length; i++) {
    const odd = 2 * i + 1 < x.length ? codeOf(x[2 * i + 1] as number) : codeOf(0);
    packed[i] = (codeOf(x[2 * i] as number) << 4) | odd;
  }
  return { packed, absmax };
}

/** The nearest entry of the map; a tie takes the even index. */
function dynamicIndex(x: number, map: Float32Array): number {
  let [low, high] = [0, 255];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if ((map[middle] as number) < x) low = middle;
    else high = middle;
  }
  const middle = f(f((map[low] as number) + (map[high] as number)) * 0.5);
  return x > middle || (x === middle && high % 2 === 0) ? high : low;
}

export function quantize8bitReference(v: Float32Array, map: Float32Array): { index: Uint8Array; absmax: Float32Array } {
  const { x, absmax } = scaled(v, 256);
  return { index: Uint8Array.from(x, (value) => dynamicIndex(value, map)), absmax };
}

/** Of a matrix whose values fp16 holds. */
export function quantizeInt8Reference(v: Float32Array, K: number): { q: Int8Array; absmax: Float32Array } {
  const absmax = new Float32Array(v.length / K);
  const q = new Int8Array(v.length);
  for (let n = 0; n < absmax.length; n++) {
    const row = v.subarray(n * K, (n + 1) * K);
    const top = row.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    const scale = top > 0 ? f(127 * f(1 / top)) : 0;
    absmax[n] = top;
    for (let k = 0; k < K; k++) {
      const exact = f((row[k] as number) * scale);
      const low = Math.floor(exact);
      q[n * K + k] = exact - low === 0.5 ? low + (low & 1) : Math.round(exact);
    }
  }
  return { q, absmax };
}
