/** What the names of the option `optimizer` mean, as data. */
import { type OptimizerOp, type OptimizerRule, optimizerRules, stateBlock } from '../ops/optimizer.js';
import { bytesPerElement, type DType } from '../tensor.js';
import type { ResolvedTrainerOptions } from './options.js';

export interface OptimizerKind {
  rule: OptimizerRule;
  /** Of an element of state. */
  bits: 8 | 32;
  /** Whether its state may go to a file where memory is short. */
  pages: boolean;
}

export const optimizerKinds: Record<ResolvedTrainerOptions['optimizer'], OptimizerKind> = {
  paged_adamw_32bit: { rule: 'adamw', bits: 32, pages: true },
  paged_adamw_8bit: { rule: 'adamw', bits: 8, pages: true },
  adamw_32bit: { rule: 'adamw', bits: 32, pages: false },
  adamw_8bit: { rule: 'adamw', bits: 8, pages: false },
  sgd: { rule: 'sgd', bits: 32, pages: false },
  lion_32bit: { rule: 'lion', bits: 32, pages: false },
  lion_8bit: { rule: 'lion', bits: 8, pages: false },
  ademamix: { rule: 'ademamix', bits: 32, pages: false },
};

/** Below it state stays fp32 in every kind. */
const smallest8bit = 4096;

/** A tensor of state beside a parameter. */
export interface StatePart {
  /** Behind the parameter's name, in a file. */
  name: string;
  dtype: DType;
  shape: readonly number[];
  bytes: number;
}

type StateOptions = Pick<ResolvedTrainerOptions, 'optimizer' | 'momentum'>;

/** The operation that updates a parameter of this shape, and the state that it keeps, in the operation's order. */
export function keptState(
  { optimizer, momentum }: StateOptions,
  shape: readonly number[],
): { op: OptimizerOp; parts: StatePart[] } {
  const { rule, bits } = optimizerKinds[optimizer];
  const size = shape.reduce((n, d) => n * d, 1);
  const part = (name: string, dtype: DType, of: readonly number[]): StatePart => ({
    name,
    dtype,
    shape: of,
    bytes: of.reduce((n, d) => n * d, bytesPerElement[dtype]),
  });
  if (bits === 8 && size >= smallest8bit) {
    const parts = optimizerRules[rule].states.flatMap((state) => [
      part(`${state}.index`, 'u8', shape),
      part(`${state}.absmax`, 'f32', [Math.ceil(size / stateBlock)]),
    ]);
    return { op: `${rule}8bit` as OptimizerOp, parts };
  }
  // SGD alone has a state that it may do without.
  const states = rule === 'sgd' && momentum === 0 ? [] : optimizerRules[rule].states;
  return { op: rule, parts: states.map((state) => part(state, 'f32', shape)) };
}

/** Bytes of state, gradients not counted, for parameters of these shapes. */
export function stateBytes(options: StateOptions, shapes: readonly (readonly number[])[]): number {
  return shapes.flatMap((shape) => keptState(options, shape).parts).reduce((sum, { bytes }) => sum + bytes, 0);
}
