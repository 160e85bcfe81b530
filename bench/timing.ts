import type { Stream } from '../lib/tensor.js';

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2
    ? (sorted[middle] as number)
    : ((sorted[middle - 1] as number) + (sorted[middle] as number)) / 2;
}

/**
 * The least of the runs that fit into `seconds`, at least three, in milliseconds. `enqueue(i)` makes run i; a run is long
 * enough that its end is seen late.
 */
export async function leastMs(stream: Stream, seconds: number, enqueue: (i: number) => void): Promise<number> {
  let least = Number.POSITIVE_INFINITY;
  const end = performance.now() + seconds * 1000;
  let i = 0;
  // Several calls between two waits, so that what a wait costs does not count.
  let calls = 1;
  while (performance.now() < end || i < 3 * calls) {
    const start = performance.now();
    for (let c = 0; c < calls; c++) enqueue(i++);
    await stream.sync();
    const ms = performance.now() - start;
    least = Math.min(least, ms / calls);
    if (ms < 10) calls = Math.min(64, calls * 2);
  }
  return least;
}

/**
 * How much longer `second` takes than `first`, in milliseconds: the median over pairs that follow each other, since a
 * small difference of long times drowns in what a machine's speed changes meanwhile.
 */
export async function differenceMs(
  stream: Stream,
  seconds: number,
  first: (i: number) => void,
  second: (i: number) => void,
): Promise<number> {
  const differences: number[] = [];
  const timed = async (enqueue: (i: number) => void) => {
    const start = performance.now();
    enqueue(differences.length);
    await stream.sync();
    return performance.now() - start;
  };
  for (const end = performance.now() + seconds * 1000; performance.now() < end || differences.length < 3; ) {
    const ms = await timed(first);
    differences.push((await timed(second)) - ms);
  }
  return median(differences);
}
