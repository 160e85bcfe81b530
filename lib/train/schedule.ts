/** Learning rates by step, as transformers' schedules of the same names compute them. Steps count from 0. */

export const scheduleNames = [
  'constant',
  'linear',
  'cosine',
  'constant_with_warmup',
  'cosine_with_restarts',
  'polynomial',
  'inverse_sqrt',
] as const;
export type ScheduleName = (typeof scheduleNames)[number];

export interface ScheduleOptions {
  warmupSteps: number;
  totalSteps: number;
  /** cosine: 0.5 is one half wave; cosine_with_restarts: waves, default 1. */
  numCycles?: number;
  /** polynomial; default 1. */
  power?: number;
  /** polynomial: where it ends; default 1e-7. */
  lrEnd?: number;
}

interface Progress {
  step: number;
  base: number;
  /** 0 at the end of warm-up, 1 at the last step. */
  progress: number;
  options: ScheduleOptions;
}

/** After warm-up, as a share of the base rate. */
const shapes: Record<ScheduleName, (p: Progress) => number> = {
  constant: () => 1,
  constant_with_warmup: () => 1,
  linear: ({ step, options: { warmupSteps, totalSteps } }) =>
    Math.max(0, (totalSteps - step) / Math.max(1, totalSteps - warmupSteps)),
  cosine: ({ progress, options: { numCycles = 0.5 } }) =>
    Math.max(0, 0.5 * (1 + Math.cos(Math.PI * numCycles * 2 * progress))),
  cosine_with_restarts: ({ progress, options: { numCycles = 1 } }) =>
    progress >= 1 ? 0 : Math.max(0, 0.5 * (1 + Math.cos(Math.PI * ((numCycles * progress) % 1)))),
  polynomial: ({ step, base, progress, options: { totalSteps, power = 1, lrEnd = 1e-7 } }) =>
    (step > totalSteps ? lrEnd : (base - lrEnd) * (1 - progress) ** power + lrEnd) / base,
  inverse_sqrt: ({ step, options: { warmupSteps } }) => {
    const timescale = warmupSteps || 10_000;
    return 1 / Math.sqrt((step + timescale - warmupSteps) / timescale);
  },
};

/** The rate of a step. Warm-up is linear from 0; 'constant' has none. */
export function learningRateAt(name: ScheduleName, base: number, step: number, options: ScheduleOptions): number {
  const { warmupSteps, totalSteps } = options;
  if (name !== 'constant' && step < warmupSteps) return base * (step / Math.max(1, warmupSteps));
  const progress = (step - warmupSteps) / Math.max(1, totalSteps - warmupSteps);
  return base * shapes[name]({ step, base, progress, options });
}
