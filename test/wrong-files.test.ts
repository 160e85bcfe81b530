/** Files that are missing, damaged or of another model: a QLoRAError that says what is wrong, and nothing is lost. */
import { cpSync, mkdirSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import t from 'tap';
import { QuantizedModel } from '../lib/index.js';
import { ConfigReader } from '../lib/models/config-reader.js';
import { qwen2 } from '../lib/models/families/qwen2.js';
import { packageRoot, readJson, referencesDir } from './support/references.js';
import { refuses, use, type Wrong } from './support/refuses.js';

const tiny = join(referencesDir('models'), 'llama');
const demo = join(packageRoot(), 'examples', 'demo', 'model');

type Change = (directory: string) => void;
interface Header {
  [name: string]: { dtype: string; shape: number[]; data_offsets: [number, number] };
}

/** Rewrites model.safetensors through its header and data. */
function editWeights(directory: string, edit: (header: Header, data: Buffer) => void): void {
  const path = join(directory, 'model.safetensors');
  const file = readFileSync(path);
  const start = 8 + Number(file.readBigUInt64LE(0));
  const header = JSON.parse(file.toString('utf8', 8, start)) as Header;
  const data = file.subarray(start);
  edit(header, data);
  const text = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  writeFileSync(path, Buffer.concat([length, text, data]));
}

function editJson(path: string, edit: (json: Record<string, unknown>) => void): void {
  const json = JSON.parse(readFileSync(path, 'utf8')) as Record<string, unknown>;
  edit(json);
  writeFileSync(path, JSON.stringify(json));
}
const config =
  (edit: (json: Record<string, unknown>) => void): Change =>
  (d) =>
    editJson(join(d, 'config.json'), edit);
const q = 'model.layers.1.self_attn.q_proj.weight';

t.test('model folders', async (t) => {
  await refuses(t, 'no folder', () => QuantizedModel.load('/no/such/folder'), {
    code: 'ERR_QLORA_MODEL_NOT_FOUND',
    message: /\/no\/such\/folder: there is no such folder/,
  });
  const cases: [string, Change, Wrong][] = [
    [
      'no config.json',
      (d) => rmSync(join(d, 'config.json')),
      { code: 'ERR_QLORA_MODEL_NOT_FOUND', message: /no config\.json/ },
    ],
    [
      'no weights',
      (d) => rmSync(join(d, 'model.safetensors')),
      { code: 'ERR_QLORA_MODEL_NOT_FOUND', message: /neither model\.safetensors nor/ },
    ],
    [
      'a record of its training that is a folder',
      (d) => mkdirSync(join(d, 'qlora_node.json')),
      { code: 'ERR_QLORA_READ_FAILED', message: /qlora_node\.json: it is no regular file/ },
    ],
    [
      'cut off',
      (d) => truncateSync(join(d, 'model.safetensors'), 50_000),
      { code: 'ERR_QLORA_SAFETENSORS', message: /model\.safetensors/ },
    ],
    [
      'cut off in the header',
      (d) => truncateSync(join(d, 'model.safetensors'), 100),
      { code: 'ERR_QLORA_SAFETENSORS', message: /model\.safetensors/ },
    ],
    [
      'a header that lies about offsets',
      (d) =>
        editWeights(d, (h) => {
          (h[q] as Header[string]).data_offsets[1] += 1e9;
        }),
      { code: 'ERR_QLORA_SAFETENSORS', message: /q_proj/ },
    ],
    [
      'a header that lies about a shape',
      (d) =>
        editWeights(d, (h) => {
          (h[q] as Header[string]).shape = [64, 65];
        }),
      { code: 'ERR_QLORA_SAFETENSORS', message: /q_proj/ },
    ],
    [
      'another shape',
      (d) =>
        editWeights(d, (h) => {
          (h[q] as Header[string]).shape = [32, 128];
        }),
      { code: 'ERR_QLORA_SHAPE', message: /\[64, 64\].*\[32, 128\]/ },
    ],
    [
      'another dtype',
      (d) =>
        editWeights(d, (h) => {
          (h[q] as Header[string]).dtype = 'I16';
        }),
      { code: 'ERR_QLORA_DTYPE', message: /F32, BF16 or F16, got I16/ },
    ],
    [
      'a missing tensor',
      (d) =>
        editWeights(d, (h) => {
          h.other = h[q] as Header[string];
          delete h[q];
        }),
      { code: 'ERR_QLORA_TENSOR_NOT_FOUND', message: /layers\.1\.self_attn\.q_proj\.weight/ },
    ],
    [
      'one too many',
      config((c) => {
        c.num_hidden_layers = 1;
      }),
      { code: 'ERR_QLORA_TENSOR_UNEXPECTED', message: /layers\.1\./ },
    ],
    [
      'NaN',
      (d) => editWeights(d, (h, data) => data.writeUInt16LE(0x7e00, (h[q] as Header[string]).data_offsets[0] + 20)),
      { code: 'ERR_QLORA_NON_FINITE', message: /q_proj.*element 10 / },
    ],
    [
      'an infinity in a norm',
      (d) =>
        editWeights(d, (h, data) =>
          data.writeUInt16LE(0x7c00, (h['model.norm.weight'] as Header[string]).data_offsets[0]),
        ),
      { code: 'ERR_QLORA_NON_FINITE', message: /model\.norm/ },
    ],
    [
      'another vocabulary',
      config((c) => {
        c.vocab_size = 100;
      }),
      { code: 'ERR_QLORA_SHAPE', message: /\[100, \d+\].*\[\d+, \d+\]/ },
    ],
    [
      'an unknown field',
      config((c) => {
        c.residual_multiplier = 0.5;
      }),
      {
        code: 'ERR_QLORA_CONFIG_UNKNOWN_FIELD',
        message: /'residual_multiplier' \(0\.5\)/,
        hint: /allowUnknownConfig: \['residual_multiplier'\]/,
      },
    ],
    [
      'a misspelt field',
      config((c) => {
        c.rope_tetha = 5;
      }),
      { code: 'ERR_QLORA_CONFIG_UNKNOWN_FIELD', message: /rope_tetha/, hint: /Did you mean 'rope_theta'/ },
    ],
    [
      'a wrong value',
      config((c) => {
        c.hidden_size = 'big';
      }),
      { code: 'ERR_QLORA_CONFIG_INVALID', message: /'hidden_size' must be a number, got "big"/ },
    ],
    [
      'heads that do not divide',
      config((c) => {
        c.num_attention_heads = 5;
      }),
      { code: 'ERR_QLORA_CONFIG_INVALID', message: /64 and 5/ },
    ],
    [
      'another family',
      config((c) => {
        c.model_type = 'lama';
      }),
      { code: 'ERR_QLORA_MODEL_UNSUPPORTED', message: /got "lama"/, hint: /Did you mean 'llama'/ },
    ],
    [
      'config.json that is none',
      (d) => writeFileSync(join(d, 'config.json'), '{'),
      { code: 'ERR_QLORA_JSON', message: /config\.json/ },
    ],
    [
      'a tokenizer that is none',
      (d) => writeFileSync(join(d, 'tokenizer.json'), '[]'),
      { code: 'ERR_QLORA_TOKENIZER_INVALID', message: /tokenizer\.json/ },
    ],
    [
      'an end token that is none',
      (d) =>
        editJson(join(d, 'generation_config.json'), (c) => {
          c.eos_token_id = 'x';
        }),
      { code: 'ERR_QLORA_CONFIG', message: /'eos_token_id'.*"x"/ },
    ],
  ];
  for (const [what, change, wrong] of cases) {
    const directory = t.testdir();
    cpSync(tiny, directory, { recursive: true });
    change(directory);
    await refuses(t, what, () => QuantizedModel.load(directory), wrong);
  }
  const directory = t.testdir();
  cpSync(tiny, directory, { recursive: true });
  config((c) => Object.assign(c, { a: null, b: false, c: 1, d: { e: 2 } }))(directory);
  const model = await QuantizedModel.load(directory, { allowUnknownConfig: ['c', 'd'] });
  t.ok(model, 'null, false and what is allowed pass');
  use(undefined);
  await model.dispose();

  // What SmolLM2's and LLaMA's files on the hub have beside what transformers reads.
  const known = { is_llama_config: true, rope_interleaved: false, max_sequence_length: 2048 };
  config((c) => Object.assign(c, { c: null, d: null, ...known, 'transformers.js_config': { dtype: 'q4' } }))(directory);
  await (await QuantizedModel.load(directory)).dispose();
  config((c) => Object.assign(c, { rope_interleaved: true }))(directory);
  await t.rejects(QuantizedModel.load(directory), {
    code: 'ERR_QLORA_CONFIG_UNKNOWN_FIELD',
    message: /rope_interleaved/,
  });

  const rope_scaling = { type: 'linear', factor: 2, finetuned: true };
  config((c) => Object.assign(c, { rope_interleaved: false, rope_scaling }))(directory);
  const hint = /allowUnknownConfig: \['finetuned'\]/;
  await t.rejects(QuantizedModel.load(directory), { code: 'ERR_QLORA_CONFIG_UNKNOWN_FIELD', hint });
  await using allowed = await QuantizedModel.load(directory, { allowUnknownConfig: ['finetuned'] });
  await allowed.merge(join(directory, 'merged'));
});

t.test("Qwen2's windows: which layers have one, and what config.json gets wrong", async (t) => {
  const base = readJson<Record<string, unknown>>(referencesDir('models'), 'qwen2-yarn', 'config.json');
  const windows = (changes: object) => {
    const fields = new ConfigReader({ ...base, num_hidden_layers: 4, ...changes });
    const { attention } = qwen2.config(fields);
    fields.finish();
    return attention.windows;
  };
  const layers = (...types: ('full' | 'sliding')[]) => ({ layer_types: types.map((type) => `${type}_attention`) });
  t.same(windows({}), [0, 9, 9, 9]);
  t.same(windows({ max_window_layers: 0 }), [9, 9, 9, 9]);
  t.same(windows({ max_window_layers: 4 }), [0, 0, 0, 0]);
  t.same(windows({ use_sliding_window: false }), [0, 0, 0, 0]);
  t.same(windows({ sliding_window: null, use_sliding_window: false }), [0, 0, 0, 0]);
  t.same(windows(layers('sliding', 'full', 'sliding', 'full')), [9, 0, 9, 0], 'layer_types decides');
  const wrong: [object, Wrong][] = [
    [layers('full', 'sliding'), { code: 'ERR_QLORA_CONFIG_INVALID', message: /each of the 4 layers, got 2/ }],
    [
      { ...layers('full', 'full', 'full', 'sliding'), use_sliding_window: false },
      { code: 'ERR_QLORA_CONFIG_INVALID', message: /while use_sliding_window is false/ },
    ],
    [
      { layer_types: ['full_attention', 'chunked_attention', 'full_attention', 'full_attention'] },
      { code: 'ERR_QLORA_CONFIG_INVALID', message: /'layer_types' must be an array of 'full_attention'/ },
    ],
    [{ sliding_window: 0 }, { code: 'ERR_QLORA_CONFIG_INVALID', message: /'sliding_window' must be a positive/ }],
    [{ num_key_value_heads: undefined }, { code: 'ERR_QLORA_CONFIG_INVALID', message: /'num_key_value_heads'/ }],
    [{ hidden_act: 'gelu' }, { code: 'ERR_QLORA_CONFIG_INVALID', message: /'hidden_act' must be one of 'silu'/ }],
    [
      { dual_chunk_attention_config: { chunk_size: 8 } },
      { code: 'ERR_QLORA_CONFIG_UNKNOWN_FIELD', message: /dual_chunk_attention_config/ },
    ],
  ];
  for (const [changes, expected] of wrong) t.throws(() => windows(changes), expected);
});

t.test("another model's adapter, a damaged one", async (t) => {
  const other = await QuantizedModel.load(demo);
  other.addLora('x', { r: 2 });
  await other.adapters.get('x')?.save(join(t.testdir(), 'adapter'));
  const folder = join(t.testdirName, 'adapter');
  await other.dispose();
  const model = await QuantizedModel.load(tiny);
  use(model);
  const load = () => model.loadLora('x', folder);
  await refuses(t, 'of a wider model', load, { code: 'ERR_QLORA_SHAPE', message: /\[2, 64\].*got \[2, 192\]/ });
  t.equal(model.adapters.size, 0, 'it is not half loaded');
  truncateSync(join(folder, 'adapter_model.safetensors'), 500);
  await refuses(t, 'cut off', load, { code: 'ERR_QLORA_SAFETENSORS', message: /adapter_model/ });
  editJson(join(folder, 'adapter_config.json'), (c) => {
    c.peft_type = 'IA3';
  });
  await refuses(t, 'another method', load, { code: 'ERR_QLORA_ADAPTER_UNSUPPORTED', message: /IA3/ });
  await refuses(t, 'an adapter as a model', () => QuantizedModel.load(folder), {
    code: 'ERR_QLORA_MODEL_NOT_FOUND',
    message: /config\.json/,
    hint: /loadLora/,
  });
  t.equal(model.adapters.size, 0);
  use(undefined);
  await model.dispose();
});
