import { bytesPerElement, type FloatDType, type Stream, type Tensor } from '../tensor.js';

/** What csrc/ops/weight.h describes: a matrix [N, K] that a linear layer multiplies with, in any form it may have. */
export interface WeightTensors {
  data: Tensor;
  /** 4-bit: block maxima, or their 8-bit indices; 8-bit: row maxima. */
  absmax?: Tensor;
  /** 4-bit: the 16 values of the type. */
  code?: Tensor;
  type?: 'nf4' | 'fp4';
  /** Double quantization: maxima of blocks of 256 block maxima, the 256 values, and the mean that was taken off. */
  nestedAbsmax?: Tensor;
  nestedCode?: Tensor;
  offset?: number;
  blockSize?: number;
  /** What the values were before they were quantized. */
  original?: FloatDType;
}

export class Weight {
  readonly stream: Stream;
  /** In the order of the C++ struct's `visit`. */
  readonly args: readonly (Tensor | number | undefined)[];
  /** What a backward rule that reads the weight must hold. */
  readonly held: readonly Tensor[];

  constructor(
    /** Output features. */
    readonly N: number,
    /** Input features. */
    readonly K: number,
    readonly tensors: Readonly<WeightTensors>,
    /** What goes with the weight. Left out: all but the codes, which the weights of a stream share. */
    private readonly owned: readonly (Tensor | undefined)[] = [tensors.data, tensors.absmax, tensors.nestedAbsmax],
  ) {
    const { data, absmax, code, nestedAbsmax, nestedCode, blockSize = 0, offset = 0 } = tensors;
    const matrices = [data, absmax, code, nestedAbsmax, nestedCode];
    this.stream = data.stream;
    this.args = [...matrices, N, K, blockSize, offset];
    this.held = matrices.filter((t) => t !== undefined);
  }

  static dense(data: Tensor): Weight {
    return new Weight(data.dim(0), data.dim(1), { data });
  }

  get isDense(): boolean {
    const { dtype } = this.tensors.data;
    return dtype === 'f32' || dtype === 'bf16' || dtype === 'f16';
  }

  /** Of a dense weight that is trained. */
  get requiresGrad(): boolean {
    return this.tensors.data.requiresGrad;
  }

  /** What the files of the unquantized model hold it in. */
  get originalDtype(): FloatDType {
    const { data, original } = this.tensors;
    return this.isDense ? (data.dtype as FloatDType) : (original ?? 'bf16');
  }

  get sizeBytes(): number {
    const { data, absmax, nestedAbsmax } = this.tensors;
    const bytes = (t: Tensor | undefined) => (t ? t.size * bytesPerElement[t.dtype] : 0);
    return bytes(data) + bytes(absmax) + bytes(nestedAbsmax);
  }

  dispose(): void {
    for (const t of this.owned) t?.dispose();
  }
}
