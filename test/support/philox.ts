/** Philox4x32-10 once more, from the paper (Salmon et al., 2011), in BigInt: the four words of a counter. */
export function philox(seed: number, stream: number, index: number): [number, number, number, number] {
  const low = 0xffffffffn;
  let [c0, c1, c2, c3] = [BigInt(index) & low, BigInt(index) >> 32n, BigInt(stream) & low, BigInt(stream) >> 32n];
  let [k0, k1] = [BigInt(seed) & low, BigInt(seed) >> 32n];
  for (let round = 0; round < 10; round++) {
    const [p0, p1] = [0xd2511f53n * c0, 0xcd9e8d57n * c2];
    [c0, c1, c2, c3] = [(p1 >> 32n) ^ c1 ^ k0, p1 & low, (p0 >> 32n) ^ c3 ^ k1, p0 & low];
    [k0, k1] = [(k0 + 0x9e3779b9n) & low, (k1 + 0xbb67ae85n) & low];
  }
  return [Number(c0), Number(c1), Number(c2), Number(c3)];
}

/** The factors that dropout gives n elements: 0, or 1 / (1 - p). */
export function dropoutFactors(n: number, p: number, seed: number, stream: number): Float64Array {
  const factors = new Float64Array(n);
  for (let i = 0; i < n; i += 4) {
    philox(seed, stream, i / 4).forEach((word, j) => {
      if (i + j < n) factors[i + j] = (word >>> 8) / 2 ** 24 >= Math.fround(p) ? 1 / (1 - p) : 0;
    });
  }
  return factors;
}
