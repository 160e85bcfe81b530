import type { Tape } from '../autograd.js';
import { doraScale, loraRowNorm } from '../ops/dora.js';
import { loraLinear } from '../ops/lora-linear.js';
import { matmul } from '../ops/matmul.js';
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
    const y = this.#forward(tape, x, pass);
    pass.inspect?.(this.path, y);
    return y;
  }

  #forward(tape: Tape | undefined, x: Tensor, pass: Pass): Tensor {
    const lora = pass.adapter === undefined ? undefined : this.adapters.get(pass.adapter);
    if (!lora) return matmul(tape, x, this.weight, this.bias);
    const frozen = pass.frozen?.get(this);
    const { A, B, scale, magnitude } = frozen ? { ...frozen, scale: 1 } : lora;
    const weight = lora.residual ?? this.weight;
    const dropout = pass.dropout ? lora.dropout : 0;
    const key = { seed: pass.dropout?.seed ?? 0, stream: (pass.dropout?.microStep ?? 0) * 2 ** 20 + this.index };
    if (!magnitude) return loraLinear(tape, x, weight, this.bias, { A, B, scale, dropout, ...key });
    using z = loraLinear(tape, x, weight, undefined, { A, B, scale, dropout, ...key });
    if (frozen?.norm) return doraScale(tape, z, magnitude, frozen.norm, this.bias);
    using norm = loraRowNorm(weight, A, B, scale, x.dtype as FloatDType);
    return doraScale(tape, z, magnitude, norm, this.bias);
  }

  dispose(): void {
    this.weight.dispose();
    this.bias?.dispose();
    for (const lora of this.adapters.values()) lora.dispose();
  }
}
