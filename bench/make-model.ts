/**
 * A model folder in a known model's shape, with random bf16 weights and a byte-level tokenizer: what a bench runs on
 * where no model is given.
 *
 *     npm run bench -- make-model --preset qwen2.5-0.5b --out FOLDER
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { safetensorsHeader } from '../lib/io/safetensors.js';
import { choice, column, count, defineBench, megabytes, rounded } from './bench.js';
import { temporaryFolder } from './temporary.js';

const llama = { model_type: 'llama', architectures: ['LlamaForCausalLM'], attention_bias: false, mlp_bias: false };
const qwen2 = { model_type: 'qwen2', architectures: ['Qwen2ForCausalLM'], use_sliding_window: false };
const llama3Rope = {
  rope_type: 'llama3',
  factor: 32,
  low_freq_factor: 1,
  high_freq_factor: 4,
  original_max_position_embeddings: 8192,
};

const shape = (
  family: object,
  [hidden, intermediate, layers, heads, kvHeads, vocabulary]: [number, number, number, number, number, number],
  more: object,
) => ({
  ...family,
  hidden_size: hidden,
  intermediate_size: intermediate,
  num_hidden_layers: layers,
  num_attention_heads: heads,
  num_key_value_heads: kvHeads,
  head_dim: hidden / heads,
  vocab_size: vocabulary,
  tie_word_embeddings: true,
  rms_norm_eps: 1e-5,
  rope_theta: 10000,
  max_position_embeddings: 2048,
  hidden_act: 'silu',
  bos_token_id: 256,
  eos_token_id: 257,
  pad_token_id: 258,
  torch_dtype: 'bfloat16',
  ...more,
});
type Config = ReturnType<typeof shape>;

/** config.json by name. */
export const presets = {
  tiny: shape(llama, [64, 192, 2, 4, 2, 512], {}),
  'tiny-qwen2': shape(qwen2, [64, 192, 2, 4, 2, 512], {}),
  'smollm-135m': shape(llama, [576, 1536, 30, 9, 3, 49152], {}),
  'qwen2.5-0.5b': shape(qwen2, [896, 4864, 24, 14, 2, 151936], {
    rope_theta: 1e6,
    rms_norm_eps: 1e-6,
    max_position_embeddings: 32768,
  }),
  'tinyllama-1.1b': shape(llama, [2048, 5632, 22, 32, 4, 32000], { tie_word_embeddings: false }),
  'llama-3.2-1b': shape(llama, [2048, 8192, 16, 32, 8, 128256], {
    rope_theta: 5e5,
    rope_scaling: llama3Rope,
    max_position_embeddings: 131072,
  }),
} as const;
export type Preset = keyof typeof presets;
export const presetNames = Object.keys(presets) as Preset[];

/** Name and shape of every tensor, in file order. */
function tensorsOf(config: Config): [string, number[]][] {
  const [C, F] = [config.hidden_size, config.intermediate_size];
  const [q, kv] = [config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim];
  const tensors: [string, number[]][] = [['model.embed_tokens.weight', [config.vocab_size, C]]];
  for (let i = 0; i < config.num_hidden_layers; i++) {
    const layer = `model.layers.${i}`;
    for (const [name, rows] of [
      ['q', q],
      ['k', kv],
      ['v', kv],
    ] as const) {
      tensors.push([`${layer}.self_attn.${name}_proj.weight`, [rows, C]]);
      if ('use_sliding_window' in config) tensors.push([`${layer}.self_attn.${name}_proj.bias`, [rows]]);
    }
    tensors.push(
      [`${layer}.self_attn.o_proj.weight`, [C, q]],
      [`${layer}.mlp.gate_proj.weight`, [F, C]],
      [`${layer}.mlp.up_proj.weight`, [F, C]],
      [`${layer}.mlp.down_proj.weight`, [C, F]],
      [`${layer}.input_layernorm.weight`, [C]],
      [`${layer}.post_attention_layernorm.weight`, [C]],
    );
  }
  tensors.push(['model.norm.weight', [C]]);
  if (!config.tie_word_embeddings) tensors.push(['lm_head.weight', [config.vocab_size, C]]);
  return tensors;
}

const one = 0x3f80;
const table = 2 ** 16;
const chunkElements = 2 ** 21;

/** Draws of a normal distribution of deviation 0.02 as bf16, to choose from by 16 random bits. */
function normalTable(next: () => number): Uint16Array {
  const values = new Float32Array(table);
  for (let i = 0; i < table; i += 2) {
    const radius = 0.02 * Math.sqrt(-2 * Math.log((next() + 1) / 2 ** 32));
    const angle = (2 * Math.PI * next()) / 2 ** 32;
    values[i] = radius * Math.cos(angle);
    values[i + 1] = radius * Math.sin(angle);
  }
  return Uint16Array.from(new Uint32Array(values.buffer), (bits) => bits >>> 16);
}

/** Xorshift (Marsaglia, 2003): 32 random bits a call. */
function randomBits(seed: number): () => number {
  let state = seed;
  return () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return state >>> 0;
  };
}

async function writeWeights(file: FileHandle, config: Config): Promise<number> {
  const tensors = tensorsOf(config).map(([name, shape]) => ({
    name,
    shape,
    dtype: 'BF16' as const,
    bytes: 2 * shape.reduce((n, d) => n * d, 1),
  }));
  const header = safetensorsHeader(tensors, { format: 'pt' });
  await file.writeFile(header);
  const next = randomBits(0x9e3779b9);
  const normal = normalTable(next);
  const chunk = new Uint16Array(chunkElements);
  for (const { name, bytes } of tensors) {
    for (let left = bytes / 2; left > 0; left -= chunk.length) {
      const part = chunk.subarray(0, Math.min(left, chunk.length));
      if (name.endsWith('norm.weight')) part.fill(one);
      else if (name.endsWith('.bias')) part.fill(0);
      else {
        for (let i = 0; i < part.length; i += 2) {
          const bits = next();
          part[i] = normal[bits & (table - 1)] as number;
          part[i + 1] = normal[bits >>> 16] as number;
        }
      }
      await file.writeFile(new Uint8Array(part.buffer, 0, part.byteLength));
    }
  }
  return tensors.reduce((sum, { bytes }) => sum + bytes, header.length);
}

const special = ['<s>', '</s>', '<pad>'];

/** 256 bytes without merges, then what is special; the model's other ids have no text. */
function tokenizerJson(): object {
  // The printable stand-in of each byte, as byte-level BPE spells it.
  const printable = (b: number) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  let spare = 256;
  const symbols = Array.from({ length: 256 }, (_, b) => String.fromCodePoint(printable(b) ? b : spare++));
  const byteLevel = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true };
  return {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: special.map((content, i) => ({
      id: 256 + i,
      content,
      single_word: false,
      lstrip: false,
      rstrip: false,
      normalized: false,
      special: true,
    })),
    normalizer: null,
    pre_tokenizer: byteLevel,
    post_processor: null,
    decoder: byteLevel,
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: false,
      vocab: Object.fromEntries(symbols.map((symbol, i) => [symbol, i])),
      merges: [],
    },
  };
}

/** Writes the folder, a few megabytes in memory at a time. @returns bytes of the weights */
export async function makeModel(preset: Preset, directory: string, layers?: number): Promise<number> {
  const config: Config = { ...presets[preset], ...(layers && { num_hidden_layers: layers }) };
  const { bos_token_id, eos_token_id, pad_token_id } = config;
  const [bos_token, eos_token, pad_token] = special;
  mkdirSync(directory, { recursive: true });
  const write = (name: string, json: object) =>
    writeFileSync(join(directory, name), JSON.stringify(json, undefined, 2));
  write('config.json', config);
  write('generation_config.json', { bos_token_id, eos_token_id, pad_token_id });
  write('tokenizer.json', tokenizerJson());
  const tokenizerClass = { tokenizer_class: 'PreTrainedTokenizerFast', clean_up_tokenization_spaces: false };
  write('tokenizer_config.json', { ...tokenizerClass, bos_token, eos_token, pad_token, model_max_length: 2048 });
  await using file = await open(join(directory, 'model.safetensors'), 'w');
  return await writeWeights(file, config);
}

/** Of a bench that runs on a model. */
export const modelOptions = {
  model: { type: 'string' },
  preset: { type: 'string', default: 'smollm-135m' },
} as const;

/** The folder that was given, or a temporary one with random weights in the preset's shape. */
export async function modelFolder(given: {
  model?: string;
  preset: string;
}): Promise<{ folder: string; model: string }> {
  if (given.model) return { folder: given.model, model: basename(given.model) };
  const preset = choice('preset', given.preset, presetNames);
  const folder = join(temporaryFolder(), preset);
  await makeModel(preset, folder);
  return { folder, model: preset };
}

export default defineBench({
  name: 'make-model',
  about: 'a model folder with random weights, to give to the others as --model',
  options: { preset: { type: 'string' }, out: { type: 'string' }, layers: { type: 'string' } },
  columns: [
    column('preset', 14, 'preset'),
    megabytes('weights', 'bytes'),
    column('s', 6, 'seconds', 2),
    column('folder', 0, 'folder'),
  ],
  async run({ preset, out, layers }, emit) {
    if (!preset || !out) throw new Error(`make-model needs --preset (${presetNames.join(', ')}) and --out FOLDER`);
    const start = performance.now();
    const bytes = await makeModel(
      choice('preset', preset, presetNames),
      out,
      layers ? count('layers', layers) : undefined,
    );
    emit({ preset, folder: out, bytes, seconds: rounded((performance.now() - start) / 1000) });
  },
});
