import type { Tape } from '../autograd.js';
import { Tensor } from '../tensor.js';
import { scaleByTensor } from './elementwise.js';
import type { Weight } from './weight.js';

export interface LinearCrossEntropyOptions {
  /** Multiplies the sum of the tokens' losses: 1 / (tokens that count) for their mean. */
  scale: number;
  /** f32 [1]: gradients, not the loss, are multiplied by it; default 1. For f16, whose small gradients would vanish. */
  lossScale?: Tensor;
  /** [V], added to the logits; gets no gradient. */
  bias?: Tensor;
  /** Logits x become softCap * tanh(x / softCap), as in Gemma 2; default 0, which leaves them. */
  softCap?: number;
  /** f32, like labels: overwritten with each token's loss, unscaled; 0 where it does not count. */
  tokenLoss?: Tensor;
}

/**
 * The output head and the loss at once: scale * sum over labels other than -100 of -log softmax(h W^T)[label], [1] f32.
 * Logits never exist as a whole. Gradients are computed in the same visit, while a chunk's logits are at hand: with a
 * tape, those of a trained weight are added to its gradient here and now, as for a loss whose gradient is lossScale.
 *
 * @param h [.., C] of any float dtype
 * @param weight [V, C]
 * @param labels i32, one a row of h; one outside [0, V) and not -100 makes the loss fail with ERR_QLORA_TOKEN_ID
 */
export function linearCrossEntropy(
  tape: Tape | undefined,
  h: Tensor,
  weight: Weight,
  labels: Tensor,
  { scale, lossScale, bias, softCap = 0, tokenLoss }: LinearCrossEntropyOptions,
): Tensor {
  const { stream } = h;
  const loss = new Tensor(stream, 'f32', [1]);
  const dh = tape && h.requiresGrad ? new Tensor(stream, h.dtype, h.shape) : undefined;
  const dweight = tape && weight.requiresGrad ? weight.tensors.data.gradient : undefined;
  const outputs = [loss, tokenLoss, dh, dweight];
  stream.run('linearCrossEntropy', h, ...weight.args, bias, labels, lossScale, ...outputs, scale, softCap);
  if (dh) {
    tape?.record([h], [loss], [dh], ([dloss]) => [scaleByTensor(undefined, dh, dloss as Tensor)]);
    dh.dispose();
  }
  return loss;
}
