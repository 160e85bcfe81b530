import type { ModelCore } from '../lib/models/core.js';

/**
 * The FLOP of a token that no implementation can do without, where every token is a target. With P weights in the linear
 * layers, V C in the head, a = 2 T H D a layer for causal attention over T tokens, and l = r (N + K) a linear layer for an
 * adapter of rank r:
 *
 *   forward 2 P + 2 V C + a + 2 l;  backward 2 P + 2 V C + 2.5 a + 4 l;  recomputing the layers 2 P + a + 2 l
 */
export function flopPerToken({ config, weights }: ModelCore, sequence: number, r: number) {
  const P = weights.linears.reduce((sum, { weight }) => sum + weight.N * weight.K, 0);
  const head = 2 * config.hiddenSize * config.vocabSize;
  const attention = 2 * sequence * config.numHeads * config.headDim * config.numLayers;
  const adapters = weights.linears.reduce((sum, { weight }) => sum + r * (weight.N + weight.K), 0);
  return {
    head,
    forward: 2 * P + head + attention + 2 * adapters,
    backward: 2 * P + head + 2.5 * attention + 4 * adapters,
    recompute: 2 * P + attention + 2 * adapters,
  };
}
