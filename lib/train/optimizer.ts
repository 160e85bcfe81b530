import { openSafetensors, writeSafetensors } from '../io/safetensors.js';
import { fill, zeros } from '../ops/elementwise.js';
import { gradNorm } from '../ops/grad-norm.js';
import { adamw, sgd } from '../ops/optimizer.js';
import type { Tensor } from '../tensor.js';
import type { ResolvedTrainerOptions } from './options.js';

/** The parameters that are trained, their gradients and the optimizer's state, all fp32 and on the stream. */
export class Optimizer {
  readonly #parameters: readonly Tensor[];
  readonly #gradients: readonly Tensor[];
  /** m and v of AdamW; the momentum of SGD. */
  readonly #states: readonly (readonly Tensor[])[];
  readonly #options: ResolvedTrainerOptions;

  constructor(parameters: readonly Tensor[], options: ResolvedTrainerOptions) {
    this.#parameters = parameters;
    this.#options = options;
    const like = () => parameters.map((p) => zeros(p.stream, p.shape, 'f32', 'optimizer'));
    this.#gradients = like();
    parameters.forEach((p, i) => {
      p.requiresGrad = true;
      p.gradient = this.#gradients[i];
    });
    const count = options.optimizer === 'sgd' ? (options.momentum ? 1 : 0) : 2;
    this.#states = Array.from({ length: count }, like);
  }

  /** Forgets what was accumulated. */
  zeroGradients(): void {
    for (const gradient of this.#gradients) fill(gradient, 0);
  }

  /**
   * One step from the accumulated gradients, clipped to maxGradNorm. Nothing changes where their norm is not finite, or
   * one of `checks`.
   *
   * @param step from 1
   * @param checks [1] each, 0 where all is well
   * @returns [norm before clipping, 1 where it is finite]
   */
  step(step: number, learningRate: number, checks: readonly Tensor[]): Tensor {
    const o = this.#options;
    const norm = gradNorm((this.#parameters[0] as Tensor).stream, [...this.#gradients, ...checks]);
    const common = { lr: learningRate, weightDecay: o.weightDecay, step, maxNorm: o.maxGradNorm };
    if (o.optimizer === 'sgd') {
      const [momentum = []] = this.#states;
      sgd(this.#parameters, this.#gradients, momentum, norm, { ...common, momentum: o.momentum });
    } else {
      const [m, v] = this.#states as [Tensor[], Tensor[]];
      const adam = { beta1: o.adamBeta1, beta2: o.adamBeta2, eps: o.adamEpsilon };
      adamw(this.#parameters, this.#gradients, { m, v }, norm, { ...common, ...adam });
    }
    return norm;
  }

  /** Writes all of its state to one safetensors file. @throws ERR_QLORA_DISK_FULL, ERR_QLORA_WRITE_FAILED */
  async save(path: string): Promise<void> {
    await writeSafetensors(
      path,
      this.#named().map(([name, data]) => ({ name, data })),
    );
  }

  /** Reads what save() wrote, bit for bit. @throws ERR_QLORA_TENSOR_NOT_FOUND, ERR_QLORA_SHAPE, ERR_QLORA_READ_FAILED */
  async load(path: string): Promise<void> {
    using file = await openSafetensors(path);
    for (const [name, tensor] of this.#named()) await file.read(name, tensor);
  }

  /** By the parameter's number and the state's. */
  #named(): [string, Tensor][] {
    return this.#states.flatMap((tensors, k) => tensors.map((t, i): [string, Tensor] => [`${i}.state${k + 1}`, t]));
  }

  dispose(): void {
    for (const p of this.#parameters) {
      p.requiresGrad = false;
      p.gradient = undefined;
    }
    for (const t of [...this.#gradients, ...this.#states.flat()]) t.dispose();
  }
}
