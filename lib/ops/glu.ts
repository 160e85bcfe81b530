import type { Tape } from '../autograd.js';
import { Tensor } from '../tensor.js';

/** By the names of Hugging Face's `hidden_act`. */
export type Activation = 'silu' | 'gelu_pytorch_tanh' | 'gelu' | 'relu';

/** As the addon numbers them. */
const activationIndex: Readonly<Record<Activation, number>> = { silu: 0, gelu_pytorch_tanh: 1, gelu: 2, relu: 3 };

/** y = activation(gate) * up, elementwise: one shape, one float dtype. Source: Shazeer, 2020. */
export function glu(tape: Tape | undefined, gate: Tensor, up: Tensor, activation: Activation): Tensor {
  const { stream, dtype, shape } = gate;
  const index = activationIndex[activation];
  const y = new Tensor(stream, dtype, shape);
  stream.run('gluForward', gate, up, y, index);
  tape?.record([gate, up], [y], [gate, up], ([dy]) => {
    const dgate = new Tensor(stream, dtype, shape);
    const dup = new Tensor(stream, dtype, shape);
    stream.run('gluBackward', dy, gate, up, dgate, dup, index);
    return [dgate, dup];
  });
  return y;
}
