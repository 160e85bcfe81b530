import { Tensor } from '../tensor.js';
import type { LoraArguments } from './lora-linear.js';
import type { Weight } from './weight.js';

/** A linear layer as `loraLinear` or, without an adapter, `matmul` computes it. */
export interface Projection {
  weight: Weight;
  bias?: Tensor | undefined;
  lora?: Pick<LoraArguments, 'A' | 'B' | 'scale'> | undefined;
  /** [.., N] of x's dtype, which is added to y. */
  residual?: Tensor | undefined;
}

/**
 * The outputs of layers that share x, without gradients: to the bits of each by itself and, with a residual, of `add`
 * after it; a device does with them at once.
 *
 * @param x [.., K] of any float dtype; outputs have the same
 * @param layers from one to three
 */
export function projections(x: Tensor, layers: readonly Projection[]): Tensor[] {
  const rows = x.shape.slice(0, -1);
  const made = layers.map(({ weight, bias, lora, residual }) => {
    const y = new Tensor(x.stream, x.dtype, [...rows, weight.N]);
    const t = lora && new Tensor(x.stream, x.dtype, [...rows, lora.A.dim(0)]);
    return { y, t, args: [...weight.args, bias, lora?.A, lora?.B, residual, y, t, lora?.scale ?? 0] };
  });
  x.stream.run('projections', x, layers.length, ...made.flatMap(({ args }) => args));
  for (const { t } of made) t?.dispose();
  return made.map(({ y }) => y);
}
