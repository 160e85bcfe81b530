/** Optimizer steps over all parameters at once. Formulas: csrc/ops/optimizer.h. */
import type { Tensor } from '../tensor.js';

export interface StepOptions {
  lr: number;
  weightDecay: number;
  /** Counts from 1. */
  step: number;
  /** Gradients are scaled so that their norm is at most this; 0 leaves them. */
  maxNorm: number;
}

/** One entry a parameter, of its shape, f32; zeros before the first step. */
export interface AdamWState {
  m: readonly Tensor[];
  v: readonly Tensor[];
}

export interface AdamWOptions extends StepOptions {
  beta1: number;
  beta2: number;
  eps: number;
}

/**
 * AdamW with decoupled weight decay (Loshchilov and Hutter, 2019), in place. Where norm says that a gradient is not
 * finite, nothing changes.
 *
 * @param params f32
 * @param gradients parallel to params
 * @param norm gradNorm's result
 */
export function adamw(
  params: readonly Tensor[],
  gradients: readonly Tensor[],
  { m, v }: AdamWState,
  norm: Tensor,
  { lr, beta1, beta2, eps, weightDecay, step, maxNorm }: AdamWOptions,
): void {
  norm.stream.run('adamw', params, gradients, m, v, norm, lr, beta1, beta2, eps, weightDecay, step, maxNorm);
}

export interface SgdOptions extends StepOptions {
  momentum: number;
}

/**
 * Stochastic gradient descent as PyTorch's, in place. Where norm says that a gradient is not finite, nothing changes.
 *
 * @param params f32
 * @param gradients parallel to params
 * @param momentumState parallel to params, or empty where momentum is 0
 * @param norm gradNorm's result
 */
export function sgd(
  params: readonly Tensor[],
  gradients: readonly Tensor[],
  momentumState: readonly Tensor[],
  norm: Tensor,
  { lr, momentum, weightDecay, step, maxNorm }: SgdOptions,
): void {
  norm.stream.run('sgd', params, gradients, momentumState, norm, lr, momentum, weightDecay, step, maxNorm);
}
