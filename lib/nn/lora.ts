import { QLoRAError } from '../errors.js';
import { loraRowNorm } from '../ops/dora.js';
import { fill } from '../ops/elementwise.js';
import { randomUniform } from '../ops/random.js';
import { type FloatDType, type Stream, Tensor } from '../tensor.js';
import type { Linear } from './linear.js';

export interface LoraShape {
  r: number;
  alpha: number;
  dropout: number;
  useRslora: boolean;
  useDora: boolean;
}

/**
 * A low-rank change of one linear layer: y = W x + scale * B (A x), with A [r, K] and B [N, r] in fp32. With DoRA the
 * rows of W + scale * B A are scaled to the trained lengths `magnitude` [N].
 *
 * Source: LoRA (Hu et al., 2021); rsLoRA (Kalajdzievski, 2023): scale = alpha / sqrt(r); DoRA (Liu et al., 2024).
 */
export class LoraLinear {
  readonly path: string;
  readonly inFeatures: number;
  readonly outFeatures: number;
  readonly r: number;
  readonly alpha: number;
  readonly scale: number;
  readonly dropout: number;
  /** @internal */
  readonly A: Tensor;
  /** @internal */
  readonly B: Tensor;
  /** @internal */
  readonly magnitude: Tensor | undefined;

  /** @internal */
  constructor(stream: Stream, linear: Linear, shape: LoraShape) {
    const { N, K } = linear.weight;
    this.path = linear.path;
    this.inFeatures = K;
    this.outFeatures = N;
    this.r = shape.r;
    this.alpha = shape.alpha;
    this.scale = shape.alpha / (shape.useRslora ? Math.sqrt(shape.r) : shape.r);
    this.dropout = shape.dropout;
    this.A = new Tensor(stream, 'f32', [this.r, K], 'adapters');
    this.B = new Tensor(stream, 'f32', [N, this.r], 'adapters');
    this.magnitude = shape.useDora ? new Tensor(stream, 'f32', [N], 'adapters') : undefined;
  }

  /** @internal PEFT's start: A Kaiming-uniform with a = sqrt 5, which is uniform within 1 / sqrt(K); B zero; magnitude |W|. */
  initialize(linear: Linear, dtype: FloatDType, seed: number, layer: number): void {
    const bound = 1 / Math.sqrt(this.inFeatures);
    randomUniform(this.A, -bound, bound, seed, layer);
    fill(this.B, 0);
    if (this.magnitude) {
      loraRowNorm(linear.weight, this.A, this.B, this.scale, dtype, this.magnitude);
    }
  }

  /** @internal What is trained, A first. */
  get parameters(): Tensor[] {
    return this.magnitude ? [this.A, this.B, this.magnitude] : [this.A, this.B];
  }

  /** A [r, inFeatures] or B [outFeatures, r], row-major. */
  read(which: 'A' | 'B'): Promise<Float32Array> {
    return this[which].read();
  }

  async write(which: 'A' | 'B', data: Float32Array): Promise<void> {
    const target = this[which];
    if (!(data instanceof Float32Array) || data.length !== target.size) {
      throw new QLoRAError(
        'ERR_QLORA_SHAPE',
        `${this.path}: ${which} takes a Float32Array of ${target.shape.join(' x ')} = ${target.size} numbers, got ${
          data instanceof Float32Array ? data.length : typeof data
        }`,
      );
    }
    await target.write(data.slice()); // a copy: the caller may go on changing its own
  }

  /** @internal */
  dispose(): void {
    for (const t of this.parameters) t.dispose();
  }
}
