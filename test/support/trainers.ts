/** Trainers over tiny models. */
import { join } from 'node:path';
import type { Test } from 'tap';
import { QLoRATrainer, type TrainerOptions } from '../../lib/index.js';
import { packageRoot, referencesDir } from './references.js';

export const tiny = join(referencesDir('models'), 'llama');
export const demo = join(packageRoot(), 'examples', 'demo', 'model');

export const rowOf = (i: number, length: number) => ({
  inputIds: Array.from({ length }, (_, k) => (11 * i + 7 * k) % 200),
});
export const rows = [rowOf(1, 9), rowOf(2, 14), rowOf(3, 5), rowOf(4, 22)];
export const plain = { computeDtype: 'f32', quantization: 'none' } as const;

export function create(t: Test, options: Partial<TrainerOptions> = {}): Promise<QLoRATrainer> {
  return QLoRATrainer.create({
    model: tiny,
    dataset: rows,
    outputDir: join(t.testdirName, 'out'),
    learningRate: 1e-2,
    gradientAccumulationSteps: 2,
    ...(options.initialAdapter ? {} : { lora: { r: 4 } }),
    ...options,
  });
}
