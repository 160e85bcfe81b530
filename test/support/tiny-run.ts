/** A run of a fraction of a second in which much happens. */
import { join } from 'node:path';
import type { TrainerOptions } from '../../lib/index.js';
import { referencesDir } from './references.js';

export const rowOf = (i: number, length: number) => ({
  inputIds: Array.from({ length }, (_, k) => (11 * i + 7 * k + ((i * k) % 5)) % 200),
});

/** Dropout, since its masks follow from the number of the micro-step; rows that fill no whole number of steps. */
export const tinyRun = (outputDir: string, options: Partial<TrainerOptions> = {}): TrainerOptions => ({
  model: join(referencesDir('models'), 'llama-train'),
  dataset: Array.from({ length: 9 }, (_, i) => rowOf(i, 4 + (i % 5))),
  evalDataset: [rowOf(20, 8), rowOf(21, 5)],
  outputDir,
  lora: { r: 2, dropout: 0.2, targetModules: ['q_proj', 'down_proj'] },
  gradientAccumulationSteps: 2,
  learningRate: 1e-2,
  lrScheduler: 'cosine',
  maxSteps: 40,
  evalSteps: 4,
  saveSteps: 2,
  saveTotalLimit: 2,
  keepBest: true,
  ...options,
});
