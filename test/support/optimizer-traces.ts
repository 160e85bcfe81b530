/** The traces of test/references/optimizers, and a rule that runs along one. */
import { join } from 'node:path';
import { zeros } from '../../lib/ops/elementwise.js';
import { gradNorm } from '../../lib/ops/grad-norm.js';
import { finishStep, type OptimizerOp, optimizerStep, ruleOf, type StepOptions } from '../../lib/ops/optimizer.js';
import { type Stream, Tensor } from '../../lib/tensor.js';
import { readJson, referencesDir } from './references.js';
import { readSafetensors, type StoredTensor, valuesOf } from './safetensors.js';

export interface Trace {
  name: string;
  optimizer: 'adamw' | 'lion' | 'ademamix' | 'sgd';
  options: {
    lr: number;
    betas?: number[];
    eps?: number;
    weight_decay: number;
    momentum?: number;
    alpha?: number;
    horizon?: number | null;
    bits?: number;
  };
  size: number;
  /** Those after which `param` has a row. */
  steps: number[];
  start: string;
  grad: string;
  param: string;
  'cpu.param'?: string;
  /** fp32 state after the last step. */
  finalState?: Record<string, string>;
  /** 8-bit state after each of `steps`. */
  state?: Record<string, string>;
}

export interface Clipping {
  name: string;
  maxNorm: number;
  tensors: number;
  totalNorm: number;
}

const folder = referencesDir('optimizers');
export const index = readJson<{ traces: Trace[]; clipping: Clipping[] }>(folder, 'index.json');
/** Our own 8-bit references hold the bits of the same arithmetic; for others the tolerances of their README. */
export const exact = process.env.QLORA_REFERENCES === undefined;

function tensorsOf(file: string): (name: string) => StoredTensor {
  const tensors = readSafetensors(join(folder, file));
  return (name) => tensors.get(name) as StoredTensor;
}
export const stored = tensorsOf('traces.safetensors');
export const reference = (name: string) => valuesOf(stored(name));
export const clipping = tensorsOf('clipping.safetensors');
export const lastStep = 12;

/**
 * The largest |a - e| over 1e-6 + 1e-6 |e|: at most 1 is what the references allow.
 *
 * @param summed what e is a sum of, where terms may cancel: the larger of both counts
 */
export function worst(actual: Float32Array, expected: Float32Array, summed?: Float32Array): number {
  if (actual.length !== expected.length) return Number.POSITIVE_INFINITY;
  let most = 0;
  for (const [i, e] of expected.entries()) {
    const size = Math.max(Math.abs(e), summed?.[i] ?? 0);
    const error = Math.abs((actual[i] as number) - e) / (1e-6 + 1e-6 * size);
    most = Math.max(most, Number.isNaN(error) ? Number.POSITIVE_INFINITY : error);
  }
  return most;
}

export async function readAll(tensors: readonly Tensor[]): Promise<Float32Array> {
  const parts = await Promise.all(tensors.map((x) => x.read()));
  return Float32Array.from(parts.flatMap((part) => [...part]));
}

/** The parameters of a trace with their state. */
export class Run {
  readonly op: OptimizerOp;
  readonly params: Tensor[];
  /** By name: of 8 bits `m.index` and `m.absmax`. */
  readonly state = new Map<string, Tensor[]>();
  readonly counted: { counters: Tensor; lossScale: Tensor };
  readonly #stream: Stream;
  readonly #options: StepOptions;
  readonly #cut: (data: Float32Array) => Tensor[];

  constructor(stream: Stream, { optimizer, options, size, start }: Trace) {
    const eight = options.bits === 8 && size >= 4096;
    this.#stream = stream;
    this.op = eight ? (`${optimizer}8bit` as OptimizerOp) : optimizer;
    // Cut in two tensors, of which the first has an odd size; blocks of 8 bits would straddle the cut.
    const at = eight || size === 1 ? size : Math.floor(size / 3) | 1;
    this.#cut = (data) =>
      [data.slice(0, at), data.slice(at)].filter((d) => d.length).map((d) => Tensor.from(stream, d, [d.length]));
    this.params = this.#cut(reference(start).slice(0, size));
    const like = (dtype: 'f32' | 'u8', of: (n: number) => number) =>
      this.params.map((p) => zeros(stream, [of(p.size)], dtype, 'optimizer'));
    for (const name of options.momentum === 0 ? [] : ruleOf(this.op).states) {
      if (eight) {
        this.state.set(
          `${name}.index`,
          like('u8', (n) => n),
        );
        this.state.set(
          `${name}.absmax`,
          like('f32', (n) => Math.ceil(n / 256)),
        );
      } else {
        this.state.set(
          name,
          like('f32', (n) => n),
        );
      }
    }
    this.counted = counters(stream, 1);
    const [beta1, beta2, beta3] = options.betas ?? [];
    this.#options = {
      lr: options.lr,
      weightDecay: options.weight_decay,
      maxNorm: 0,
      beta1,
      beta2,
      beta3,
      eps: options.eps,
      alpha: options.alpha,
      horizon: options.horizon ?? 0,
      momentum: options.momentum,
    };
  }

  step(gradient: Float32Array): void {
    const gradients = this.#cut(gradient);
    const norm = gradNorm(this.#stream, gradients);
    const inputs = { params: this.params, gradients, norm, ...this.counted };
    const applied = optimizerStep(this.op, inputs, [...this.state.values()], this.#options);
    const result = finishStep(norm, [applied], this.counted, 0);
    for (const tensor of [...gradients, norm, applied, result]) tensor.dispose();
  }
}

export function gradientOf({ grad, size }: Trace, step: number): Float32Array {
  const { shape } = stored(grad);
  const row = (step - 1) * (shape[1] as number);
  return reference(grad).slice(row, row + size);
}

/** Of each element. */
export function largestGradient(trace: Trace): Float32Array {
  const steps = Array.from({ length: lastStep }, (_, i) => gradientOf(trace, i + 1));
  return Float32Array.from({ length: trace.size }, (_, i) => Math.max(...steps.map((g) => Math.abs(g[i] as number))));
}

export function counters(stream: Stream, scale: number): { counters: Tensor; lossScale: Tensor } {
  return { counters: zeros(stream, [2], 'i32'), lossScale: Tensor.from(stream, Float32Array.of(scale), [1]) };
}
