/** NEFTune: noise on the embeddings while training (Jain et al., 2023). */

/** alpha / sqrt(L C) for each token of a sequence of L tokens, packed or not; 0 in padding. [batch, length] */
export function noiseMagnitudes(
  alpha: number,
  hiddenSize: number,
  { batch, length, segmentIds }: { batch: number; length: number; segmentIds?: Int32Array },
): Float32Array {
  const ids = segmentIds ?? new Int32Array(batch * length);
  const magnitudes = new Float32Array(batch * length);
  for (let begin = 0; begin < ids.length; ) {
    const rowEnd = (Math.floor(begin / length) + 1) * length;
    let end = begin + 1;
    while (end < rowEnd && ids[end] === ids[begin]) end++;
    if ((ids[begin] as number) >= 0) magnitudes.fill(alpha / Math.sqrt((end - begin) * hiddenSize), begin, end);
    begin = end;
  }
  return magnitudes;
}

/** No dropout mask has it: those count layers from 0 (nn/linear.ts). */
export function noiseStream(microStep: number): number {
  return microStep * 2 ** 20 + 2 ** 20 - 1;
}
