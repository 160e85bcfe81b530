import type { Tape } from '../autograd.js';
import { doraScale, loraRowNorm } from '../ops/dora.js';
import { add } from '../ops/elementwise.js';
import { loraLinear } from '../ops/lora-linear.js';
import { matmul } from '../ops/matmul.js';
import { type Projection, projections } from '../ops/projections.js';
import type { Weight } from '../ops/weight.js';
import type { FloatDType, Tensor } from '../tensor.js';
import type { FrozenLora, LoraLinear } from './lora.js';

/** How a pass through the model is made. */
export interface Pass {
  /** Name of the adapter in use; undefined for the base alone. */
  adapter: string | undefined;
  /** Of that adapter, where many passes follow each other that do not train it. */
  frozen?: ReadonlyMap<Linear, FrozenLora>;
  /** While training: the key of this micro-step's dropout masks. */
  dropout?: { seed: number; microStep: number };
  /** Is shown what each part of the model computes: a linear layer's output with its path, another's with its weight or name. */
  inspect?: (part: string | Tensor, y: Tensor) => void;
}

/** A layer as a pass computes it. */
interface Layer extends Projection {
  lora?: LoraLinear | (FrozenLora & { scale: number });
  /** With DoRA: y is scaled to these lengths of rows, and has its bias after that. */
  magnitude?: Tensor | undefined;
  /** The lengths of the rows as they are, where they are known. */
  norm?: Tensor | undefined;
}

/** A linear layer over a base of any kind, with the adapters that were added to it. */
export class Linear {
  readonly adapters = new Map<string, LoraLinear>();

  constructor(
    /** Its path in the Hugging Face model, e.g. model.layers.0.self_attn.q_proj. */
    readonly path: string,
    /** Its place among the model's linear layers: the key of its random numbers. */
    readonly index: number,
    readonly weight: Weight,
    readonly bias: Tensor | undefined,
  ) {}

  /** x [.., K] to [.., N] */
  forward(tape: Tape | undefined, x: Tensor, pass: Pass): Tensor {
    const layer = this.#layer(pass);
    const y = this.#scaled(tape, this.#product(tape, x, layer, pass), layer, x.dtype as FloatDType);
    pass.inspect?.(this.path, y);
    return y;
  }

  /** residual + forward(x), to the same bits as `add` of both. */
  addTo(tape: Tape | undefined, residual: Tensor, x: Tensor, pass: Pass): Tensor {
    const layer = this.#layer(pass);
    if (isAtOnce(tape, pass) && !layer.magnitude) return projections(x, [{ ...layer, residual }])[0] as Tensor;
    using y = this.forward(tape, x, pass);
    return add(tape, residual, y);
  }

  /** What forward() of each layer makes of one x, to the same bits. */
  static forwardAll<L extends readonly Linear[]>(
    tape: Tape | undefined,
    linears: L,
    x: Tensor,
    pass: Pass,
  ): { [K in keyof L]: Tensor } {
    return Linear.#forwardAll(tape, linears, x, pass) as { [K in keyof L]: Tensor };
  }

  static #forwardAll(tape: Tape | undefined, linears: readonly Linear[], x: Tensor, pass: Pass): Tensor[] {
    if (!isAtOnce(tape, pass)) return linears.map((linear) => linear.forward(tape, x, pass));
    const layers = linears.map((linear) => linear.#layer(pass));
    const made = projections(x, layers);
    return linears.map((linear, i) =>
      linear.#scaled(tape, made[i] as Tensor, layers[i] as Layer, x.dtype as FloatDType),
    );
  }

  #layer(pass: Pass): Layer {
    const { weight, bias } = this;
    const own = pass.adapter === undefined ? undefined : this.adapters.get(pass.adapter);
    if (!own) return { weight, bias };
    const frozen = pass.frozen?.get(this);
    const lora = frozen ? { ...frozen, scale: 1 } : own;
    const { magnitude } = lora;
    return { weight: own.residual ?? weight, bias: magnitude ? undefined : bias, lora, magnitude, norm: frozen?.norm };
  }

  #product(tape: Tape | undefined, x: Tensor, { weight, bias, lora }: Layer, pass: Pass): Tensor {
    if (!lora) return matmul(tape, x, weight, bias);
    const { A, B, scale } = lora;
    const dropout = pass.dropout ? (this.adapters.get(pass.adapter as string)?.dropout ?? 0) : 0;
    const key = { seed: pass.dropout?.seed ?? 0, stream: (pass.dropout?.microStep ?? 0) * 2 ** 20 + this.index };
    return loraLinear(tape, x, weight, bias, { A, B, scale, dropout, ...key });
  }

  /** With DoRA z scaled, else z itself. */
  #scaled(tape: Tape | undefined, z: Tensor, { weight, lora, magnitude, norm }: Layer, dtype: FloatDType): Tensor {
    if (!lora || !magnitude) return z;
    using product = z;
    if (norm) return doraScale(tape, product, magnitude, norm, this.bias);
    using made = loraRowNorm(weight, lora.A, lora.B, lora.scale, dtype);
    return doraScale(tape, product, magnitude, made, this.bias);
  }

  dispose(): void {
    this.weight.dispose();
    this.bias?.dispose();
    for (const lora of this.adapters.values()) lora.dispose();
  }
}

/** Whether nobody asks for what lies between the operations of a pass. */
const isAtOnce = (tape: Tape | undefined, { dropout, inspect }: Pass) => !tape && !dropout && !inspect;
