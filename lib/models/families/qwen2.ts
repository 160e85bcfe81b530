/** Qwen2 and Qwen2.5: Llama's shape with biases on q, k and v, and a window on some layers where it is switched on. */
import { QLoRAError } from '../../errors.js';
import type { DecoderConfig, Family } from '../config.js';
import type { ConfigReader } from '../config-reader.js';
import { readRope } from '../rope-config.js';
import { gatedDecoderModules, readHeads } from './gated-decoder.js';

export const qwen2: Family = {
  modelTypes: ['qwen2'],

  config(fields: ConfigReader): DecoderConfig {
    const heads = readHeads(fields);
    const numLayers = fields.count('num_hidden_layers');
    return {
      ...heads,
      numLayers,
      vocabSize: fields.count('vocab_size'),
      intermediateSize: fields.count('intermediate_size'),
      norm: { eps: fields.number('rms_norm_eps', 1e-6), offset: 0 },
      rope: readRope(fields, heads.headDim, fields.count('max_position_embeddings', 32768)),
      attention: { scale: heads.headDim ** -0.5, windows: readWindows(fields, numLayers) },
      activation: fields.string('hidden_act', ['silu'], 'silu'),
      tiedHead: fields.boolean('tie_word_embeddings', false),
    };
  },

  modules: (config) => gatedDecoderModules(config, { qkv: true, o: false, mlp: false }),

  ignored: [/\.rotary_emb\.inv_freq$/],
};

/**
 * The layers from max_window_layers on have the window (transformers 4), or those that layer_types names (5). Files say
 * sliding_window also where use_sliding_window turns it off.
 */
function readWindows(fields: ConfigReader, numLayers: number): number[] {
  const inUse = fields.boolean('use_sliding_window', false);
  const from = fields.number('max_window_layers', 28);
  const types = fields.has('layer_types')
    ? fields.strings('layer_types', ['full_attention', 'sliding_attention'])
    : Array.from({ length: numLayers }, (_, i) => (inUse && i >= from ? 'sliding_attention' : 'full_attention'));
  if (types.length !== numLayers) {
    throw new QLoRAError(
      'ERR_QLORA_CONFIG_INVALID',
      `config.json: layer_types must name each of the ${numLayers} layers, got ${types.length} names`,
      { hint: 'config.json is damaged, or num_hidden_layers was changed.' },
    );
  }
  if (!types.includes('sliding_attention')) {
    fields.skip('sliding_window');
    return types.map(() => 0);
  }
  if (!inUse) {
    throw new QLoRAError(
      'ERR_QLORA_CONFIG_INVALID',
      "config.json: layer_types has 'sliding_attention' while use_sliding_window is false",
      { hint: 'config.json is damaged: either the window is used or it is not.' },
    );
  }
  const window = fields.count('sliding_window', 4096);
  return types.map((type) => (type === 'sliding_attention' ? window : 0));
}
