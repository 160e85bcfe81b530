/** A model folder of a Llama with random weights in bf16, large enough for its parts to show in memory. */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';

/** Sizes of a model. */
export const randomLlama = { hidden: 256, intermediate: 640, layers: 6, heads: 8, kvHeads: 4, vocabulary: 1500 };

/** Writes config.json and model.safetensors, 11 MB by default, into `directory`, which exists. */
export function writeRandomLlama(directory: string, sizes: Partial<typeof randomLlama> = {}): void {
  const { hidden: C, intermediate: F, layers, heads, kvHeads, vocabulary: V } = { ...randomLlama, ...sizes };
  const kv = (C / heads) * kvHeads;
  const shapes: Record<string, number[]> = { 'model.embed_tokens.weight': [V, C], 'model.norm.weight': [C] };
  for (let i = 0; i < layers; i++) {
    const layer = `model.layers.${i}`;
    shapes[`${layer}.input_layernorm.weight`] = [C];
    shapes[`${layer}.post_attention_layernorm.weight`] = [C];
    for (const [name, N, K] of [
      ['self_attn.q_proj', C, C],
      ['self_attn.k_proj', kv, C],
      ['self_attn.v_proj', kv, C],
      ['self_attn.o_proj', C, C],
      ['mlp.gate_proj', F, C],
      ['mlp.up_proj', F, C],
      ['mlp.down_proj', C, F],
    ] as const) {
      shapes[`${layer}.${name}.weight`] = [N, K];
    }
  }
  const header: Record<string, unknown> = {};
  let size = 0;
  for (const [name, shape] of Object.entries(shapes)) {
    const bytes = 2 * shape.reduce((n, d) => n * d, 1);
    header[name] = { dtype: 'BF16', shape, data_offsets: [size, size + bytes] };
    size += bytes;
  }
  let text = JSON.stringify(header);
  text += ' '.repeat((8 - (text.length % 8)) % 8);
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  const data = new Uint16Array(size / 2);
  // Both signs, exponents around 2^-5: about what a model starts with.
  let state = 1;
  for (let i = 0; i < data.length; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    data[i] = ((state >>> 31) << 15) | ((121 + ((state >>> 20) & 1)) << 7) | ((state >>> 8) & 0x7f);
  }
  writeFileSync(
    join(directory, 'model.safetensors'),
    Buffer.concat([length, Buffer.from(text), Buffer.from(data.buffer)]),
  );
  const config = {
    model_type: 'llama',
    architectures: ['LlamaForCausalLM'],
    hidden_size: C,
    intermediate_size: F,
    num_hidden_layers: layers,
    num_attention_heads: heads,
    num_key_value_heads: kvHeads,
    vocab_size: V,
    hidden_act: 'silu',
    max_position_embeddings: 1024,
    rms_norm_eps: 1e-6,
    rope_theta: 10000,
    tie_word_embeddings: true,
    bos_token_id: 0,
    eos_token_id: 1,
  };
  writeFileSync(join(directory, 'config.json'), JSON.stringify(config));
}
