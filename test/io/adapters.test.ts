/** PEFT folders and bitsandbytes checkpoints, held to what those libraries wrote; and Python's JSON. */
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import t from 'tap';
import {
  bnbConfigJson,
  parseQuantState,
  type QuantParts,
  quantItems,
  quantStateJson,
  quantTensorNames,
  quantTypeOf,
  readBnbConfig,
  readQuantState,
} from '../../lib/io/bnb-checkpoint.js';
import { openModelFolder } from '../../lib/io/model-folder.js';
import {
  type AdapterConfig,
  type AdapterPart,
  adapterConfigJson,
  adapterKey,
  openAdapterWeights,
  readAdapterConfig,
  writeAdapterConfig,
} from '../../lib/io/peft.js';
import { adaptedModules } from '../../lib/io/peft-targets.js';
import { PythonFloat, pythonFloat, pythonJson, sortKeys } from '../../lib/io/python-json.js';
import { type SafetensorsItem, writeSafetensors } from '../../lib/io/safetensors.js';
import { Stream, Tensor } from '../../lib/tensor.js';

const references = fileURLToPath(new URL('../../../test/references/', import.meta.url));
const checkpoints = join(references, 'quantization', 'checkpoints');
const stream = new Stream();
t.teardown(() => stream.close());

t.test("Python's floats and JSON", async (t) => {
  // Each as python3 prints it.
  const floats: [number, string][] = [
    [0, '0.0'],
    [-0, '-0.0'],
    [1, '1.0'],
    [-2.5, '-2.5'],
    [0.1, '0.1'],
    [1e-4, '0.0001'],
    [0.00005133, '5.133e-05'],
    [1e-5, '1e-05'],
    [123456789.125, '123456789.125'],
    [1e15, '1000000000000000.0'],
    [9999999999999998, '9999999999999998.0'],
    [1e16, '1e+16'],
    [1.5e22, '1.5e+22'],
    [1e100, '1e+100'],
    [5e-324, '5e-324'],
    [1.7976931348623157e308, '1.7976931348623157e+308'],
    [Math.fround(0.0871836319565773), '0.0871836319565773'],
    [Number.NaN, 'NaN'],
    [-Infinity, '-Infinity'],
  ];
  for (const [x, text] of floats) t.equal(pythonFloat(x), text);
  const value = { b: [1, new PythonFloat(2), 0.5], a: 'ü\u{1f600}"\n\u007f', c: {}, d: [], e: null, f: true };
  t.equal(
    pythonJson(value),
    '{"b": [1, 2.0, 0.5], "a": "\\u00fc\\ud83d\\ude00\\"\\n\\u007f", "c": {}, "d": [], "e": null, "f": true}',
  );
  t.equal(
    pythonJson(sortKeys({ b: [1, []], a: { d: 1, c: {} } }), 2),
    '{\n  "a": {\n    "c": {},\n    "d": 1\n  },\n  "b": [\n    1,\n    []\n  ]\n}',
  );
});

t.test("adapter_config.json of PEFT's is read, and written again byte for byte", async (t) => {
  const folders = readdirSync(join(references, 'models'), { recursive: true, encoding: 'utf8' }).filter((f) =>
    f.endsWith('adapter_config.json'),
  );
  t.ok(folders.length >= 6);
  for (const name of folders) {
    const path = join(references, 'models', name);
    const config = await readAdapterConfig(join(path, '..'));
    t.equal(adapterConfigJson(config), readFileSync(path, 'utf8'), name);
    const weights = await openAdapterWeights(join(path, '..'));
    for (const key of weights.tensors.keys()) {
      const lora = /^base_model\.model\.(.+)\.lora_(A|B|magnitude)(?:\.weight|_vector)$/.exec(key);
      const [, module, part] = lora ?? ['', key.replace('base_model.model.', ''), 'whole'];
      t.equal(adapterKey(module as string, part as AdapterPart), key);
    }
  }
  t.match(await readAdapterConfig(join(references, 'models', 'llama3', 'adapter')), {
    r: 4,
    alpha: 8,
    useRslora: true,
  });
  t.match(await readAdapterConfig(join(references, 'models', 'llama-bias', 'adapter')), { useDora: true });
});

t.test('every field goes through a file', async (t) => {
  const config: AdapterConfig = {
    baseModel: 'org/name',
    r: 16,
    alpha: 32.5,
    dropout: 0.05,
    targetModules: '.*\\.(q|v)_proj',
    excludeModules: ['x'],
    layersToTransform: [0, 2],
    layersPattern: ['layers'],
    rankPattern: { 'layers.0.*': 4 },
    alphaPattern: { q_proj: 8 },
    modulesToSave: ['embed_tokens'],
    useRslora: true,
    useDora: true,
  };
  const folder = t.testdir({});
  await writeAdapterConfig(folder, config);
  t.same(await readAdapterConfig(folder), config);
  t.match(readFileSync(join(folder, 'adapter_config.json'), 'utf8'), /"lora_dropout": 0.05,/);
  writeFileSync(
    join(folder, 'adapter_config.json'),
    '{"target_modules": ["q_proj"], "layers_to_transform": 3, "layers_pattern": "h"}',
  );
  t.match(await readAdapterConfig(folder), {
    r: 8,
    alpha: 8,
    dropout: 0,
    layersToTransform: [3],
    layersPattern: ['h'],
    useDora: false,
  });
});

t.test('adapters that we cannot represent', async (t) => {
  const base = { peft_type: 'LORA', r: 4, target_modules: ['q_proj'] };
  const unsupported: [object, RegExp][] = [
    [{ bias: 'all' }, /bias "all"/],
    [{ fan_in_fan_out: true }, /fan_in_fan_out true/],
    [{ layer_replication: [[0, 2]] }, /layer_replication \[\[0,2\]\]/],
    [{ lora_bias: true }, /lora_bias true/],
    [{ use_qalora: true, trainable_token_indices: [1] }, /use_qalora true; trainable_token_indices \[1\]/],
    [{ init_lora_weights: 'pissa_niter_4' }, /init_lora_weights "pissa_niter_4"/],
    [{ peft_type: 'IA3', feedforward_modules: ['down_proj'] }, /peft_type "IA3", this library knows "LORA" alone$/],
    [{ peft_type: 'LOHA', r: undefined, rank_dropout: 0.5 }, /peft_type "LOHA", [^;]*$/],
    [{ from_the_future: 1 }, /from_the_future 1/],
  ];
  for (const [fields, message] of unsupported) {
    const folder = t.testdir({ 'adapter_config.json': JSON.stringify({ ...base, ...fields }) });
    await t.rejects(readAdapterConfig(folder), { code: 'ERR_QLORA_ADAPTER_UNSUPPORTED', message });
  }
  const wrong: object[] = [
    { r: 0 },
    { r: '8' },
    { lora_alpha: null, r: -1 },
    { lora_dropout: 1 },
    { target_modules: null },
    { target_modules: [1] },
    { rank_pattern: { a: 0 } },
    { rank_pattern: { a: 'x' } },
    { use_dora: 'yes' },
    { layers_to_transform: [0.5] },
  ];
  for (const fields of wrong) {
    const folder = t.testdir({ 'adapter_config.json': JSON.stringify({ ...base, ...fields }) });
    await t.rejects(
      readAdapterConfig(folder),
      { code: 'ERR_QLORA_CONFIG_INVALID', message: /must be .*, got/ },
      JSON.stringify(fields),
    );
  }
  const harmless = {
    init_lora_weights: 'gaussian',
    from_the_future: null,
    other: {},
    peft_version: '9',
    runtime_config: { a: 1 },
    task_type: 'SEQ_CLS',
  };
  await t.resolves(readAdapterConfig(t.testdir({ 'adapter_config.json': JSON.stringify({ ...base, ...harmless }) })));
  await t.rejects(readAdapterConfig('/none'), { code: 'ERR_QLORA_ADAPTER_NOT_FOUND' });
  await t.rejects(readAdapterConfig(t.testdir({})), {
    code: 'ERR_QLORA_ADAPTER_NOT_FOUND',
    message: /no adapter_config.json/,
  });
  await t.rejects(openAdapterWeights(t.testdir({ 'adapter_model.bin': '' })), { code: 'ERR_QLORA_PICKLE' });
});

t.test('which modules an adapter has', async (t) => {
  const layers = [0, 1, 10].flatMap((i) =>
    ['self_attn.q_proj', 'self_attn.v_proj', 'mlp.up_proj'].map((m) => `model.layers.${i}.${m}`),
  );
  const paths = [...layers, 'proj'];
  const base: AdapterConfig = {
    r: 8,
    alpha: 16,
    dropout: 0,
    targetModules: ['q_proj'],
    layersToTransform: [],
    layersPattern: [],
    rankPattern: {},
    alphaPattern: {},
    modulesToSave: [],
    useRslora: false,
    useDora: false,
  };
  const found = (config: Partial<AdapterConfig>) =>
    adaptedModules({ ...base, ...config }, paths).map(({ path }) => path.replace('model.layers.', ''));
  t.same(found({}), ['0.self_attn.q_proj', '1.self_attn.q_proj', '10.self_attn.q_proj'], 'a name ends a path at a dot');
  t.same(found({ targetModules: ['proj'] }), ['proj']);
  t.same(found({ targetModules: ['1.self_attn.v_proj'] }), ['1.self_attn.v_proj']);
  t.equal(found({ targetModules: 'all-linear' }).length, 10);
  t.same(found({ targetModules: '.*\\.1\\.(?P<x>mlp|none)\\..*' }), ['1.mlp.up_proj']);
  t.same(found({ targetModules: 'all-linear', excludeModules: '.*(q|v)_proj|proj' }), [
    '0.mlp.up_proj',
    '1.mlp.up_proj',
    '10.mlp.up_proj',
  ]);
  t.same(found({ layersToTransform: [1, 5] }), ['1.self_attn.q_proj']);
  t.same(found({ layersToTransform: [0], layersPattern: ['layers'] }), ['0.self_attn.q_proj']);
  t.throws(() => found({ layersToTransform: [0], layersPattern: ['h'] }), {
    code: 'ERR_QLORA_ADAPTER_TARGETS',
    hint: /q_proj, v_proj, up_proj, proj/,
  });
  t.throws(() => found({ targetModules: ['x'] }), { code: 'ERR_QLORA_ADAPTER_TARGETS' });
  t.throws(() => found({ targetModules: '(' }), { code: 'ERR_QLORA_PATTERN' });
  const patterned = adaptedModules(
    {
      ...base,
      rankPattern: { '1.self_attn.q_proj': 4, q_proj: 2 },
      alphaPattern: { 'layers.10.*': 3 },
      useRslora: true,
    },
    paths,
  );
  t.match(
    patterned.map(({ r, alpha, scale }) => [r, alpha, scale]),
    [
      [2, 16, 16 / Math.sqrt(2)],
      [4, 16, 8],
      [2, 3, 3 / Math.sqrt(2)],
    ],
  );
  t.equal(adaptedModules(base, paths)[0]?.scale, 2);
  t.throws(
    () => adaptedModules({ ...base, targetModules: '(a+)+b' }, ['a'.repeat(60)]),
    { code: 'ERR_QLORA_PATTERN', message: /too long/ },
    'an endless pattern is given up',
  );
});

t.test('bitsandbytes checkpoints are read, and written again byte for byte', async (t) => {
  const quantized = readdirSync(checkpoints).filter((name) => /fp4|nf4/.test(name));
  t.equal(quantized.length, 5);
  for (const name of quantized) {
    const folder = await openModelFolder(join(checkpoints, name));
    const config = readBnbConfig(folder.config);
    t.match(config, {
      type: name.includes('fp4') ? 'fp4' : 'nf4',
      doubleQuant: name.includes('double'),
      computeDtype: 'bf16',
      skipModules: [],
    });
    const bf16Storage = name.endsWith('bf16-storage');
    if (config && !bf16Storage)
      t.equal(
        pythonJson(bnbConfigJson(config)),
        pythonJson(folder.config.quantization_config).replace(': 6,', ': 6.0,'),
      );
    const items: SafetensorsItem[] = [];
    const done = new Set<string>();
    const load = (key: string): Tensor => {
      const { begin, end, dtype, file, shape } = folder.entry(key);
      const isPacked = key.endsWith('_proj.weight');
      const tensor = isPacked
        ? new Tensor(stream, 'u8', [end - begin], 'weights')
        : new Tensor(stream, dtype ?? 'u8', shape, 'weights');
      file.readBits(key, tensor).catch(t.fail);
      done.add(key);
      return tensor;
    };
    let layers = 0;
    for (const key of folder.tensors.keys()) {
      const path = key.replace(/\.weight$/, '');
      const state = key.endsWith('.weight') ? await readQuantState(folder, path) : undefined;
      if (!state) continue;
      layers++;
      t.match(state, { blockSize: 64, dtype: 'bf16' });
      t.equal(state.nested !== undefined, name.includes('double'));
      const names = quantTensorNames(path, state.type);
      const parts: QuantParts = {
        packed: load(names.packed),
        absmax: load(names.absmax),
        map: load(names.map),
        ...(state.nested && { nestedAbsmax: load(names.nestedAbsmax), nestedMap: load(names.nestedMap) }),
      };
      t.same(quantStateJson(state), await folder.entry(names.state).file.readBytes(names.state));
      items.push(...quantItems(path, state, parts));
      done.add(names.state);
    }
    t.equal(layers, 14);
    for (const key of folder.tensors.keys()) if (!done.has(key)) items.push({ name: key, data: load(key) });
    if (!bf16Storage) {
      const path = join(t.testdir({}), 'model.safetensors');
      await writeSafetensors(path, items);
      t.ok(readFileSync(path).equals(readFileSync(join(checkpoints, name, 'model.safetensors'))), name);
    }
    t.equal(quantTypeOf(folder, 'lm_head'), undefined);
    t.equal(await readQuantState(folder, 'model.embed_tokens'), undefined);
    folder.close();
  }
  t.equal(readBnbConfig({}), undefined);
  t.throws(() => readBnbConfig({ quantization_config: { quant_method: 'gptq' } }), {
    code: 'ERR_QLORA_QUANTIZATION_UNSUPPORTED',
    message: /gptq/,
  });
  t.match(readBnbConfig({ quantization_config: { quant_method: 'bitsandbytes', load_in_8bit: true } }), {
    type: 'int8',
  });
});

t.test('quantization states that lie', async (t) => {
  const good = {
    quant_type: 'nf4',
    blocksize: 64,
    dtype: 'bfloat16',
    shape: [2, 96],
    nested_blocksize: 256,
    nested_dtype: 'float32',
    nested_offset: 0.5,
  };
  const bytes = (value: unknown) => new TextEncoder().encode(JSON.stringify(value));
  t.same(parseQuantState('s', bytes(good)), {
    type: 'nf4',
    blockSize: 64,
    dtype: 'bf16',
    shape: [2, 96],
    nested: { blockSize: 256, offset: 0.5 },
  });
  const wrong = [
    [],
    'x',
    { ...good, quant_type: 'nf5' },
    { ...good, blocksize: 48 },
    { ...good, blocksize: 8192 },
    { ...good, dtype: 'int8' },
    { ...good, shape: [192] },
    { ...good, shape: [2, -96] },
    { ...good, shape: [2 ** 40, 2 ** 40] },
    { ...good, nested_blocksize: 64 },
    { ...good, nested_offset: null },
    { ...good, nested_dtype: undefined },
  ];
  for (const value of wrong)
    t.throws(
      () => parseQuantState('s', bytes(value)),
      { code: 'ERR_QLORA_QUANT_STATE', message: /'s' / },
      JSON.stringify(value),
    );
  t.throws(() => parseQuantState('s', Uint8Array.of(0xff)), { code: 'ERR_QLORA_QUANT_STATE', message: /no JSON/ });

  const path = join(t.testdir({ 'config.json': '{}' }), 'model.safetensors');
  const state = parseQuantState('s', bytes(good));
  const parts: QuantParts = {
    packed: new Uint8Array(96),
    absmax: new Uint8Array(3),
    map: new Float32Array(16),
    nestedAbsmax: new Float32Array(1),
    nestedMap: new Float32Array(256),
  };
  const open = async (items: SafetensorsItem[]) => {
    await writeSafetensors(path, items);
    return readQuantState(await openModelFolder(join(path, '..')), 'p');
  };
  t.same(await open(quantItems('p', state, parts)), state);
  const sizes: [Partial<QuantParts>, RegExp][] = [
    [{ absmax: new Uint8Array(2) }, /'p.weight.absmax' must be U8 \[3\].*is U8 \[2\]/],
    [{ map: new Float32Array(15) }, /quant_map' must be F32 \[16\]/],
    [{ nestedAbsmax: new Float32Array(2) }, /nested_absmax' must be F32 \[1\]/],
    [{ nestedMap: new Float32Array(255) }, /nested_quant_map' must be F32 \[256\]/],
  ];
  for (const [part, message] of sizes)
    await t.rejects(open(quantItems('p', state, { ...parts, ...part })), { code: 'ERR_QLORA_QUANT_STATE', message });
  const items = quantItems('p', state, parts);
  await t.rejects(open(items.filter(({ name }) => !name.endsWith('.absmax'))), {
    message: /'p.weight.absmax' .* is missing/,
  });
  const shorter = items.map((item) =>
    item.name === 'p.weight' ? { ...item, data: new Uint8Array(95), shape: [95, 1] } : item,
  );
  await t.rejects(open(shorter), { message: /'p.weight' must have 96 bytes .* has 95/ });
  const other = items.map((item) => ({ ...item, name: item.name.replace('__nf4', '__fp4') }));
  await t.rejects(open(other), { message: /says quant_type nf4/ });
  t.throws(() => quantItems('p', state, { ...parts, nestedMap: undefined }), { code: 'ERR_QLORA_ARGUMENT' });
});
