/** Parameters and gradients to try an Optimizer with: functions of names and step alone. */
import { createHash } from 'node:crypto';
import { type Stream, Tensor } from '../../lib/tensor.js';
import type { Optimizer } from '../../lib/train/optimizer.js';
import { type ResolvedTrainerOptions, resolveTrainerOptions, type TrainerOptions } from '../../lib/train/options.js';

/** Some take many slots of a megabyte, some share one, some stay fp32 in 8 bits; two have odd sizes. */
export const shapes: Readonly<Record<string, readonly number[]>> = {
  'wide.lora_A.weight': [64, 8192],
  'wide.lora_B.weight': [4096, 64],
  small: [7],
  'odd.lora_A.weight': [33, 4001],
  'odd.lora_B.weight': [301, 33],
  last: [600_001],
};

export function optionsOf(options: Partial<TrainerOptions>): ResolvedTrainerOptions {
  return resolveTrainerOptions({ model: 'model', dataset: [], outputDir: 'out', ...options });
}

/** Cheap numbers in [-1, 1) of every size. */
function numbers(size: number, seed: number): Float32Array {
  const values = new Float32Array(size);
  let state = (seed * 2654435761) >>> 0 || 1;
  for (let i = 0; i < size; i++) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    const x = (state | 0) / 2 ** 31;
    values[i] = x * x * x;
  }
  return values;
}

export function parametersOf(stream: Stream): Map<string, Tensor> {
  const entries = Object.entries(shapes);
  return new Map(
    entries.map(([name, shape], i) => {
      const size = shape.reduce((n, d) => n * d, 1);
      return [name, Tensor.from(stream, numbers(size, i + 1), shape, 'adapters')];
    }),
  );
}

/** NaN is a step whose gradient is not finite. */
export function gradientsOf(parameters: ReadonlyMap<string, Tensor>, step: number): Map<string, Float32Array> {
  return new Map(
    [...parameters].map(([name, { size }], i) => {
      const gradient = numbers(size, 100 * (Number.isNaN(step) ? 1 : step) + i);
      if (Number.isNaN(step)) gradient[size - 1] = step;
      return [name, gradient];
    }),
  );
}

/** Takes steps with the gradients of these numbers. Returns what each step's result said. */
export async function takeSteps(
  optimizer: Optimizer,
  parameters: ReadonlyMap<string, Tensor>,
  steps: readonly number[],
  learningRate = 1e-3,
): Promise<number[][]> {
  const results: number[][] = [];
  for (const step of steps) {
    optimizer.zeroGradients();
    const scale = optimizer.lossScale ? ((await optimizer.lossScale.read())[0] as number) : 1;
    for (const [name, gradient] of gradientsOf(parameters, step))
      await parameters.get(name)?.gradient?.write(scale === 1 ? gradient : gradient.map((g) => g * scale));
    using result = optimizer.step(learningRate);
    results.push([...(await result.read())]);
  }
  return results;
}

export async function bitsOf(parameters: ReadonlyMap<string, Tensor>): Promise<string> {
  const hash = createHash('sha256');
  for (const p of parameters.values()) hash.update(new Uint8Array((await p.read()).buffer));
  return hash.digest('hex');
}
