/** A model in memory alone: random weights of a known shape, quantized as soon as each is made. */
import { ConfigReader } from '../lib/models/config-reader.js';
import type { ModelCore } from '../lib/models/core.js';
import { llama } from '../lib/models/families/llama.js';
import { assemble, listModules } from '../lib/models/weights.js';
import { Linear } from '../lib/nn/linear.js';
import { cast, fill } from '../lib/ops/elementwise.js';
import { quantizeWeight } from '../lib/ops/quantize.js';
import { randomUniform } from '../lib/ops/random.js';
import { type Stream, Tensor } from '../lib/tensor.js';

/** Hidden size, that of the MLP, layers, heads, key-value heads, vocabulary. */
export type LlamaShape = readonly [number, number, number, number, number, number];

export const llamaShapes = {
  tiny: [64, 192, 2, 4, 2, 512],
  'tinyllama-1.1b': [2048, 5632, 22, 32, 4, 32000],
  'llama-3.1-8b': [4096, 14336, 32, 32, 8, 128256],
  'llama-3.1-70b': [8192, 28672, 80, 64, 8, 128256],
} as const satisfies Record<string, LlamaShape>;

/** NF4 with double quantization, computing in bf16. Its parts that a folder would have are missing. */
export async function randomModel(stream: Stream, name: keyof typeof llamaShapes): Promise<ModelCore> {
  const [hidden, intermediate, layers, heads, kvHeads, vocabulary] = llamaShapes[name];
  const configJson = {
    model_type: 'llama',
    hidden_size: hidden,
    intermediate_size: intermediate,
    num_hidden_layers: layers,
    num_attention_heads: heads,
    num_key_value_heads: kvHeads,
    vocab_size: vocabulary,
    max_position_embeddings: 8192,
    rope_theta: 500000,
  };
  const config = llama.config(new ConfigReader(configJson));
  const { hiddenSize: C, intermediateSize: F, vocabSize: V, headDim: D } = config;
  const [Q, KV] = [config.numHeads * D, config.numKvHeads * D];
  const shapes: Record<string, [number, number]> = {
    q: [Q, C],
    k: [KV, C],
    v: [KV, C],
    o: [C, Q],
    gate: [F, C],
    up: [F, C],
    down: [C, F],
    embedding: [V, C],
    head: [V, C],
  };
  const modules = listModules(llama, config, configJson);
  const loaded = new Map<string, Tensor | Linear>();
  const linears: Linear[] = [];
  const dense = new Map<string, Tensor>();
  for (const [index, { rule, from, to }] of modules.entries()) {
    if (rule.kind === 'norm') {
      const ones = new Tensor(stream, 'bf16', [C], 'weights');
      fill(ones, 1);
      loaded.set(to, ones);
      dense.set(from, ones);
      continue;
    }
    const shape = shapes[to.split('.').at(-1) as string] as [number, number];
    using wide = new Tensor(stream, 'f32', shape, 'scratch');
    const bound = Math.sqrt(3) * 0.02;
    randomUniform(wide, -bound, bound, 1, index);
    if (rule.kind === 'linear') {
      using narrow = cast(undefined, wide, 'bf16');
      const weight = await quantizeWeight(narrow, { type: 'nf4', blockSize: 64, doubleQuant: true });
      const linear = new Linear(from, linears.length, weight, undefined);
      linears.push(linear);
      loaded.set(to, linear);
    } else {
      const narrow = cast(undefined, wide, 'bf16', 'weights');
      loaded.set(to, narrow);
      dense.set(from, narrow);
    }
  }
  const places = new Map(modules.map(({ from, to }) => [from, to]));
  const weights = { decoder: assemble(config, loaded), linears, dense, modules: loaded, places };
  const core: Omit<ModelCore, 'folder' | 'generation'> = {
    directory: name,
    name,
    stream,
    family: llama,
    config,
    configJson,
    allowUnknownConfig: [],
    weights,
    computeDtype: 'bf16',
    tokenizer: undefined,
    training: undefined,
    adapters: new Map(),
  };
  return core as ModelCore;
}
