import { QLoRAError } from '../errors.js';
import { loraRowNorm } from '../ops/dora.js';
import { add, cast, fill, scale } from '../ops/elementwise.js';
import { addProduct, principalFactors, selection } from '../ops/low-rank.js';
import { matmul } from '../ops/matmul.js';
import { quantizeLike } from '../ops/quantize.js';
import { randomUniform } from '../ops/random.js';
import { Weight } from '../ops/weight.js';
import { type FloatDType, type Stream, Tensor } from '../tensor.js';
import type { Linear } from './linear.js';

export interface LoraShape {
  r: number;
  alpha: number;
  dropout: number;
  useRslora: boolean;
  useDora: boolean;
}

/** What passes read of a layer's adapter that do not train it: made once, not in each of them, to the same bits. */
export interface FrozenLora {
  /** A and scale * B, rounded to the compute dtype. */
  A: Tensor;
  B: Tensor;
  /** With DoRA: the trained lengths of the rows, and those of W + scale * B A. */
  magnitude: Tensor | undefined;
  norm: Tensor | undefined;
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
  /** @internal With PiSSA: what is left of the weight without the adapter's start, in the form that the weight has. */
  residual: Weight | undefined;
  /** @internal With PiSSA: A and B as they were at the start. */
  start: { A: Tensor; B: Tensor } | undefined;

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

  /**
   * @internal PiSSA's start: scale * B A is the best approximation of the weight of rank r, and the layer computes with
   * what is left of it. So the quantization's error is that of a matrix without its largest directions.
   *
   * Source: PiSSA (Meng et al., 2024).
   *
   * @param W f32 [N, K], the weight before it was quantized; it is overwritten
   */
  initializePrincipal(W: Tensor, linear: Linear, seed: number): void {
    const { A, B, scale } = this;
    principalFactors(W, { A, B }, { scale, seed, stream: linear.index });
    addProduct(W, B, A, -scale);
    this.residual = quantizeLike(W, linear.weight);
    this.start = { A: cast(undefined, A, 'f32', 'adapters'), B: cast(undefined, B, 'f32', 'adapters') };
  }

  /** @internal To be disposed of. */
  frozen(linear: Linear, dtype: FloatDType): FrozenLora {
    const { A, B, scale: factor, residual, magnitude } = this;
    using scaled = scale(undefined, B, factor);
    return {
      A: cast(undefined, A, dtype, 'adapters'),
      B: cast(undefined, scaled, dtype, 'adapters'),
      magnitude: magnitude && cast(undefined, magnitude, 'f32', 'adapters'),
      norm: magnitude && loraRowNorm(residual ?? linear.weight, A, B, factor, dtype),
    };
  }

  /**
   * @internal A and B over the whole weight, for files, to be disposed of where they are not the layer's own. With PiSSA
   * they are [A; A0] and [B, -B0], of rank 2 r: scale * (B A - B0 A0) is what changed since the start.
   */
  overWhole(): { A: Tensor; B: Tensor } {
    const { A, B, r, start } = this;
    if (!start) return { A, B };
    const place = (part: 0 | 1, value: number) => selection(A, [2 * r, r], -part * r, value);
    const upper = (x: Tensor, part: 0 | 1) => {
      using at = place(part, 1);
      const y = new Tensor(x.stream, 'f32', [2 * r, this.inFeatures]);
      x.stream.run('matmulBackward', at, ...Weight.dense(x).args, y);
      return y;
    };
    const beside = (x: Tensor, part: 0 | 1) => {
      using at = place(part, part === 0 ? 1 : -1);
      return matmul(undefined, x, Weight.dense(at));
    };
    using a = upper(A, 0);
    using a0 = upper(start.A, 1);
    using b = beside(B, 0);
    using b0 = beside(start.B, 1);
    return { A: add(undefined, a, a0), B: add(undefined, b, b0) };
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
    this.residual?.dispose();
    for (const t of [this.start?.A, this.start?.B]) t?.dispose();
  }
}
