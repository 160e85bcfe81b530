/** Llama 1 to 3.3, and what has its shape: TinyLlama, SmolLM, DeepSeek-Coder. */
import { QLoRAError } from '../../errors.js';
import type { DecoderConfig, Family } from '../config.js';
import type { ConfigReader } from '../config-reader.js';
import { readRope } from '../rope-config.js';

export const llama: Family = {
  modelTypes: ['llama'],

  config(fields: ConfigReader): DecoderConfig {
    const hiddenSize = fields.count('hidden_size');
    const numHeads = fields.count('num_attention_heads');
    if (!fields.has('head_dim') && hiddenSize % numHeads !== 0) {
      throw new QLoRAError(
        'ERR_QLORA_CONFIG_INVALID',
        `config.json: hidden_size must be a multiple of num_attention_heads where head_dim is not given, got ${hiddenSize} and ${numHeads}`,
        { hint: 'config.json is damaged, or belongs to another family.' },
      );
    }
    const headDim = fields.count('head_dim', hiddenSize / numHeads);
    const numKvHeads = fields.count('num_key_value_heads', numHeads);
    if (numHeads % numKvHeads !== 0) {
      throw new QLoRAError(
        'ERR_QLORA_CONFIG_INVALID',
        `config.json: num_attention_heads must be a multiple of num_key_value_heads, got ${numHeads} and ${numKvHeads}`,
        { hint: 'config.json is damaged, or belongs to another family.' },
      );
    }
    fields.boolean('attention_bias', false);
    fields.boolean('mlp_bias', false);
    return {
      vocabSize: fields.count('vocab_size'),
      hiddenSize,
      intermediateSize: fields.count('intermediate_size'),
      numLayers: fields.count('num_hidden_layers'),
      numHeads,
      numKvHeads,
      headDim,
      norm: { eps: fields.number('rms_norm_eps', 1e-6), offset: 0 },
      rope: readRope(fields, headDim, fields.count('max_position_embeddings', 2048)),
      attention: { scale: headDim ** -0.5 },
      activation: fields.string('hidden_act', ['silu'], 'silu'),
      tiedHead: fields.boolean('tie_word_embeddings', false),
    };
  },

  modules(config, fields) {
    const attention = fields.attention_bias === true;
    const mlp = fields.mlp_bias === true;
    const linear = (from: string, to: string, bias: boolean) => ({ from, to, kind: 'linear' as const, bias });
    return [
      { from: 'model.embed_tokens', to: 'embedding', kind: 'embedding' },
      { from: 'model.layers.*.input_layernorm', to: 'layers.*.attentionNorm', kind: 'norm' },
      linear('model.layers.*.self_attn.q_proj', 'layers.*.q', attention),
      linear('model.layers.*.self_attn.k_proj', 'layers.*.k', attention),
      linear('model.layers.*.self_attn.v_proj', 'layers.*.v', attention),
      linear('model.layers.*.self_attn.o_proj', 'layers.*.o', attention),
      { from: 'model.layers.*.post_attention_layernorm', to: 'layers.*.mlpNorm', kind: 'norm' },
      linear('model.layers.*.mlp.gate_proj', 'layers.*.gate', mlp),
      linear('model.layers.*.mlp.up_proj', 'layers.*.up', mlp),
      linear('model.layers.*.mlp.down_proj', 'layers.*.down', mlp),
      { from: 'model.norm', to: 'norm', kind: 'norm' },
      ...(config.tiedHead ? [] : [{ from: 'lm_head', to: 'head', kind: 'head' as const }]),
    ];
  },

  ignored: [/\.rotary_emb\.inv_freq$/],
};
