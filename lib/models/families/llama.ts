/** Llama 1 to 3.3, and what has its shape: TinyLlama, SmolLM, DeepSeek-Coder. */
import type { DecoderConfig, Family } from '../config.js';
import type { ConfigReader } from '../config-reader.js';
import { readRope } from '../rope-config.js';
import { gatedDecoderModules, readHeads } from './gated-decoder.js';

export const llama: Family = {
  modelTypes: ['llama'],

  config(fields: ConfigReader): DecoderConfig {
    const heads = readHeads(fields, 'as-heads');
    fields.boolean('attention_bias', false);
    fields.boolean('mlp_bias', false);
    return {
      ...heads,
      vocabSize: fields.count('vocab_size'),
      intermediateSize: fields.count('intermediate_size'),
      numLayers: fields.count('num_hidden_layers'),
      norm: { eps: fields.number('rms_norm_eps', 1e-6), offset: 0 },
      rope: readRope(fields, heads.headDim, fields.count('max_position_embeddings', 2048)),
      attention: { scale: heads.headDim ** -0.5 },
      activation: fields.string('hidden_act', ['silu'], 'silu'),
      tiedHead: fields.boolean('tie_word_embeddings', false),
    };
  },

  modules(config, fields) {
    const attention = fields.attention_bias === true;
    return gatedDecoderModules(config, { qkv: attention, o: attention, mlp: fields.mlp_bias === true });
  },

  ignored: [/\.rotary_emb\.inv_freq$/],
};
