/** What families of Llama's shape share: heads in config.json, and modules with a gated MLP between two norms. */
import { QLoRAError } from '../../errors.js';
import type { DecoderConfig, ModuleRule } from '../config.js';
import type { ConfigReader } from '../config-reader.js';

/** @param kvHeadsDefault 'as-heads' where a file without num_key_value_heads has as many as query heads */
export function readHeads(
  fields: ConfigReader,
  kvHeadsDefault?: 'as-heads',
): Pick<DecoderConfig, 'hiddenSize' | 'numHeads' | 'numKvHeads' | 'headDim'> {
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
  const numKvHeads = fields.count('num_key_value_heads', kvHeadsDefault && numHeads);
  if (numHeads % numKvHeads !== 0) {
    throw new QLoRAError(
      'ERR_QLORA_CONFIG_INVALID',
      `config.json: num_attention_heads must be a multiple of num_key_value_heads, got ${numHeads} and ${numKvHeads}`,
      { hint: 'config.json is damaged, or belongs to another family.' },
    );
  }
  return { hiddenSize, numHeads, numKvHeads, headDim };
}

/** @param biased which linear layers have a bias */
export function gatedDecoderModules(config: DecoderConfig, biased: Record<'qkv' | 'o' | 'mlp', boolean>): ModuleRule[] {
  const linear = (from: string, to: string, bias: boolean) => ({ from, to, kind: 'linear' as const, bias });
  return [
    { from: 'model.embed_tokens', to: 'embedding', kind: 'embedding' },
    { from: 'model.layers.*.input_layernorm', to: 'layers.*.attentionNorm', kind: 'norm' },
    linear('model.layers.*.self_attn.q_proj', 'layers.*.q', biased.qkv),
    linear('model.layers.*.self_attn.k_proj', 'layers.*.k', biased.qkv),
    linear('model.layers.*.self_attn.v_proj', 'layers.*.v', biased.qkv),
    linear('model.layers.*.self_attn.o_proj', 'layers.*.o', biased.o),
    { from: 'model.layers.*.post_attention_layernorm', to: 'layers.*.mlpNorm', kind: 'norm' },
    linear('model.layers.*.mlp.gate_proj', 'layers.*.gate', biased.mlp),
    linear('model.layers.*.mlp.up_proj', 'layers.*.up', biased.mlp),
    linear('model.layers.*.mlp.down_proj', 'layers.*.down', biased.mlp),
    { from: 'model.norm', to: 'norm', kind: 'norm' },
    ...(config.tiedHead ? [] : [{ from: 'lm_head', to: 'head', kind: 'head' as const }]),
  ];
}
