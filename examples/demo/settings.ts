/** How the demo trains. Found by trying; model/README.md has what was tried with other libraries. */

/** Of what is asked and trained on. */
export const data = {
  seed: 1,
  heldOut: 400,
  oldSkills: 300,
  rows: 2400 * 16,
  rehearsal: 0.4,
};

export const training = {
  lora: { r: 32, alpha: 32, targetModules: 'all-linear' },
  batchSize: 16,
  gradientAccumulationSteps: 1,
  epochs: 1,
  learningRate: 3e-3,
  lrScheduler: 'linear',
  warmupRatio: 0.03,
  maxGradNorm: 1,
  gradientCheckpointing: false,
  loggingSteps: 5,
  seed: 42,
} as const;

export const computeDtype = 'bf16';

/** Held-out questions of either sort that are asked while it trains, and how often. */
export const check = { questions: 40, times: 8 };

/** Below these the demo has failed. */
export const goals = { after: 0.9, kept: 0.9 };
