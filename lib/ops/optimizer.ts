/** Optimizer steps over lists of parameters. Formulas, and how state is kept: csrc/ops/optimizer.h. */
import { Tensor } from '../tensor.js';

export type StateName = 'm' | 'm2' | 'v';

/** Of each rule its state and its numbers, in the order in which the operation takes them. */
export const optimizerRules = {
  adamw: { states: ['m', 'v'], numbers: ['beta1', 'beta2', 'eps'] },
  lion: { states: ['m'], numbers: ['beta1', 'beta2'] },
  ademamix: { states: ['m', 'm2', 'v'], numbers: ['beta1', 'beta2', 'eps', 'beta3', 'alpha', 'horizon'] },
  sgd: { states: ['m'], numbers: ['momentum'] },
} as const satisfies Record<string, { states: readonly StateName[]; numbers: readonly string[] }>;

export type OptimizerRule = keyof typeof optimizerRules;
type NumberName = (typeof optimizerRules)[OptimizerRule]['numbers'][number];

/** In 8 bits there are adamw and lion. */
export type OptimizerOp = OptimizerRule | 'adamw8bit' | 'lion8bit';

/** Elements to an absmax of 8-bit state. */
export const stateBlock = 256;

export interface StepInputs {
  /** f32 */
  params: readonly Tensor[];
  /** Parallel to params; not changed. */
  gradients: readonly Tensor[];
  /** gradNorm's result over the gradients of all calls of the step. */
  norm: Tensor;
  /** i32 [2] and f32 [1], which finishStep keeps: applied steps, and what the loss was scaled by. */
  counters: Tensor;
  lossScale: Tensor;
}

export interface StepOptions extends Partial<Record<NumberName, number>> {
  lr: number;
  weightDecay: number;
  /** Gradients are scaled so that their norm is at most this; 0 leaves them. */
  maxNorm: number;
}

/**
 * One step of a rule, in place. Where norm says that a gradient is not finite, nothing changes.
 *
 * @param state for each of the rule's states a list parallel to params, f32; in 8 bits two lists, indices u8 and absmax
 *   f32. None for sgd without momentum.
 * @returns f32 [1], whether it was applied: for finishStep
 */
export function optimizerStep(
  op: OptimizerOp,
  { params, gradients, norm, counters, lossScale }: StepInputs,
  state: readonly (readonly Tensor[])[],
  { lr, weightDecay, maxNorm, ...numbers }: StepOptions,
): Tensor {
  const applied = new Tensor(norm.stream, 'f32', [1]);
  const rule = ruleOf(op);
  const own = rule.numbers.map((name) => numbers[name] ?? Number.NaN);
  const lists = state.length ? state : rule.states.map(() => []);
  const common = [params, gradients, norm, counters, lossScale, applied, lr, weightDecay, maxNorm];
  norm.stream.run(op, ...common, ...lists, ...own);
  return applied;
}

export function ruleOf(op: OptimizerOp): {
  readonly states: readonly StateName[];
  readonly numbers: readonly NumberName[];
} {
  return optimizerRules[op.replace('8bit', '') as OptimizerRule];
}

/**
 * Ends a step whose calls said `applied`: counts it, and adjusts the loss scale where growthInterval is not 0.
 *
 * @returns f32 [3]: the norm of the unscaled gradients, 1 where the step was applied and 0 where it changed nothing, and
 *   the loss scale that it had
 */
export function finishStep(
  norm: Tensor,
  applied: readonly Tensor[],
  { counters, lossScale }: Pick<StepInputs, 'counters' | 'lossScale'>,
  growthInterval: number,
): Tensor {
  const result = new Tensor(norm.stream, 'f32', [3]);
  norm.stream.run('finishStep', norm, applied, counters, lossScale, result, growthInterval);
  return result;
}
