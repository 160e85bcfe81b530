/** Model folders, and the JSON files in them. */
import { cpSync, mkdirSync, readFileSync, renameSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import t from 'tap';
import { parseGenerationConfig } from '../../lib/io/generation-config.js';
import { Fields, readJson, readJsonObject } from '../../lib/io/json.js';
import { openModelFolder } from '../../lib/io/model-folder.js';
import { openSafetensors, writeSafetensors } from '../../lib/io/safetensors.js';
import { Stream, Tensor } from '../../lib/tensor.js';

const references = fileURLToPath(new URL('../../../test/references/models/', import.meta.url));
const stream = new Stream();
t.teardown(() => stream.close());

t.test('a folder with one file, and one with shards', async (t) => {
  const one = await openModelFolder(join(references, 'llama'));
  t.equal(one.config.model_type, 'llama');
  t.match(one.generationConfig, { bosTokenId: 1, eosTokenIds: [2], padTokenId: 0, temperature: undefined });
  one.close();

  const sharded = await openModelFolder(join(references, 'llama3'));
  t.equal(sharded.tensors.size, 20);
  const name = 'model.embed_tokens.weight';
  const { dtype, shape, file } = sharded.entry(name);
  t.match(file.path, /00001-of-00002/);
  const tensor = new Tensor(stream, dtype ?? 'u8', shape, 'weights');
  await sharded.read(name, tensor);
  const part = new Tensor(stream, dtype ?? 'u8', [shape[1] as number], 'weights');
  await sharded.readPart(name, part, 2 * (shape[1] as number));
  const row = (await tensor.read()).subarray(2 * (shape[1] as number), 3 * (shape[1] as number));
  t.same(await part.read(), row);
  t.throws(() => sharded.entry('model.embed_token.weight'), {
    code: 'ERR_QLORA_TENSOR_NOT_FOUND',
    hint: /embed_tokens/,
  });
  sharded.close();
  t.throws(() => sharded.read(name, tensor), { code: 'ERR_QLORA_DISPOSED' });
});

t.test('weights that are not finite are refused', async (t) => {
  const folder = t.testdir({ 'config.json': '{}' });
  await writeSafetensors(join(folder, 'model.safetensors'), [
    { name: 'w', data: Float32Array.of(1, Number.POSITIVE_INFINITY), dtype: 'F32' },
  ]);
  const model = await openModelFolder(folder);
  await t.rejects(model.read('w', new Tensor(stream, 'f32', [2])), {
    code: 'ERR_QLORA_NON_FINITE',
    message: /'w'.*element 1/,
  });
});

t.test('folders that are no model', async (t) => {
  const folder = t.testdir({
    file: '',
    empty: {},
    adapter: { 'adapter_config.json': '{}' },
    pickle: { 'config.json': '{}', 'pytorch_model-00001-of-00002.bin': '' },
    pt: { 'config.json': '{}', 'consolidated.00.pth': '' },
    bare: { 'config.json': '{}' },
    array: { 'config.json': '[]', 'model.safetensors': '' },
    broken: { 'config.json': '{"a": 1,\n  b', 'model.safetensors': '' },
    cut: { 'config.json': '{}', 'model.safetensors': 'x' },
    generation: { 'config.json': '{}', 'generation_config.json': '{"eos_token_id": "2"}', 'model.safetensors': '' },
  });
  const cases: [string, string, RegExp, RegExp?][] = [
    ['none', 'ERR_QLORA_MODEL_NOT_FOUND', /none: there is no such folder/],
    ['file', 'ERR_QLORA_MODEL_NOT_FOUND', /no folder/],
    ['empty', 'ERR_QLORA_MODEL_NOT_FOUND', /no config.json/],
    ['adapter', 'ERR_QLORA_MODEL_NOT_FOUND', /no config.json/, /loadLora/],
    ['pickle', 'ERR_QLORA_PICKLE', /pytorch_model-00001-of-00002.bin, a pickle/, /safe_serialization=True/],
    ['pt', 'ERR_QLORA_PICKLE', /consolidated.00.pth/],
    ['bare', 'ERR_QLORA_MODEL_NOT_FOUND', /neither model.safetensors nor model.safetensors.index.json/],
    ['array', 'ERR_QLORA_JSON', /config.json: expected an object, got \[\]/],
    ['broken', 'ERR_QLORA_JSON', /config.json: .*line 2/],
    ['cut', 'ERR_QLORA_SAFETENSORS', /too few/],
    [
      'generation',
      'ERR_QLORA_CONFIG_INVALID',
      /generation_config.json: 'eos_token_id' must be a non-negative integer or a list of them, got "2"/,
    ],
  ];
  for (const [name, code, message, hint = /./] of cases) {
    await t.rejects(openModelFolder(join(folder, name)), { name: 'QLoRAError', code, message, hint }, name);
  }
});

t.test('indexes that lie', async (t) => {
  const folder = t.testdir({ 'config.json': '{}', outside: {} });
  const a = { name: 'a', data: new Uint8Array(4), dtype: 'U8' as const };
  await writeSafetensors(join(folder, 's1.safetensors'), [a]);
  await writeSafetensors(join(folder, 's2.safetensors'), [
    { ...a, name: 'b' },
    { ...a, name: 'c' },
  ]);
  await writeSafetensors(join(folder, 'outside', 'x.safetensors'), [a]);
  const good = { a: 's1.safetensors', b: 's2.safetensors', c: 's2.safetensors' };
  const open = (map: unknown) => {
    writeFileSync(join(folder, 'model.safetensors.index.json'), JSON.stringify({ weight_map: map }));
    return openModelFolder(folder);
  };
  t.equal((await open(good)).tensors.size, 3);
  const unsafe = [
    '../s1.safetensors',
    join(folder, 's1.safetensors'),
    'outside/x.safetensors',
    '..\\s1.safetensors',
    '..',
    '.',
    '',
    '.s1.safetensors',
    's1.safetensors\0',
    's1.txt',
    `${'x'.repeat(300)}.safetensors`,
  ];
  for (const name of unsafe) {
    await t.rejects(
      open({ ...good, a: name }),
      { code: 'ERR_QLORA_UNSAFE_PATH', message: /file of 'a'/ },
      JSON.stringify(name),
    );
  }
  const cases: [unknown, string, RegExp][] = [
    [{ ...good, a: 's3.safetensors' }, 'ERR_QLORA_FILE_NOT_FOUND', /s3.safetensors/],
    [{ ...good, a: 's2.safetensors' }, 'ERR_QLORA_INDEX', /'a' should be in s2.safetensors, which does not hold it/],
    [{ ...good, d: 's2.safetensors' }, 'ERR_QLORA_INDEX', /'d' should be in s2/],
    [{ a: 's1.safetensors', b: 's2.safetensors' }, 'ERR_QLORA_INDEX', /s2.safetensors holds a tensor 'c'/],
    [{ ...good, a: 1 }, 'ERR_QLORA_INDEX', /file of 'a' must be a string, got 1/],
    [{ ...good, a: 's1.bin' }, 'ERR_QLORA_INDEX', /pickle/],
    [[], 'ERR_QLORA_INDEX', /'weight_map' must be an object/],
    [undefined, 'ERR_QLORA_INDEX', /'weight_map' must be an object/],
  ];
  for (const [map, code, message] of cases) await t.rejects(open(map), { name: 'QLoRAError', code, message });
});

t.test("links: only as Hugging Face's cache has them", async (t) => {
  const root = t.testdir({ snapshots: {}, blobs: {}, plain: {}, elsewhere: {} });
  cpSync(join(references, 'llama'), join(root, 'blobs'), { recursive: true });
  cpSync(join(references, 'llama'), join(root, 'elsewhere'), { recursive: true });
  mkdirSync(join(root, 'snapshots', 'rev'));
  for (const name of ['config.json', 'model.safetensors'])
    symlinkSync(join('..', '..', 'blobs', name), join(root, 'snapshots', 'rev', name));
  const folder = await openModelFolder(join(root, 'snapshots', 'rev'));
  t.ok(folder.tensors.size);
  symlinkSync(join('snapshots', 'rev'), join(root, 'link'));
  t.ok((await openModelFolder(join(root, 'link'))).tensors.size, 'the folder itself may be a link');
  for (const name of ['config.json', 'model.safetensors'])
    symlinkSync(join('..', 'elsewhere', name), join(root, 'plain', name));
  await t.rejects(openModelFolder(join(root, 'plain')), {
    code: 'ERR_QLORA_UNSAFE_PATH',
    message: /link that leaves its folder/,
  });
  renameSync(join(root, 'blobs'), join(root, 'blobs-gone'));
  await t.rejects(
    openModelFolder(join(root, 'snapshots', 'rev')),
    { code: 'ERR_QLORA_FILE_NOT_FOUND' },
    'a link to nothing',
  );
});

t.test('generation_config.json', async (t) => {
  const parse = (object: object) => parseGenerationConfig('generation_config.json', object as Record<string, unknown>);
  t.same(parse({ eos_token_id: [128001, 128008, 128001] }).eosTokenIds, [128001, 128008]);
  t.same(parse({ eos_token_id: null }).eosTokenIds, []);
  t.same(parse({ eos_token_id: -1, pad_token_id: -1 }).eosTokenIds, []);
  t.match(
    parse({
      do_sample: true,
      temperature: 0.6,
      top_k: 50,
      top_p: 0.9,
      typical_p: 1,
      repetition_penalty: 1.1,
      max_new_tokens: 9,
      unknown: {},
    }),
    {
      doSample: true,
      temperature: 0.6,
      topK: 50,
      topP: 0.9,
      typicalP: 1,
      repetitionPenalty: 1.1,
      maxNewTokens: 9,
      minNewTokens: undefined,
    },
  );
  t.throws(() => parse({ temperature: '1' }), {
    code: 'ERR_QLORA_CONFIG_INVALID',
    message: /'temperature' must be a finite number, got "1"/,
  });
  t.throws(() => parse({ eos_token_id: [1, -1] }), { code: 'ERR_QLORA_CONFIG_INVALID' });
  t.throws(() => parse({ do_sample: 1 }), { code: 'ERR_QLORA_CONFIG_INVALID' });
});

t.test('JSON files', async (t) => {
  const folder = t.testdir({
    nan: '{"a": NaN}',
    big: ' '.repeat(1000),
    bytes: Buffer.of(0x7b, 0xff),
    ok: '{"__proto__": {"x": 1}, "a": "ü"}',
  });
  await t.rejects(readJson(join(folder, 'nan')), { code: 'ERR_QLORA_JSON', hint: /no NaN/ });
  await t.rejects(readJson(join(folder, 'big'), 999), {
    code: 'ERR_QLORA_FILE_TOO_LARGE',
    message: /1000 bytes, at most 999/,
  });
  await t.rejects(readJson(join(folder, 'bytes')), { code: 'ERR_QLORA_JSON', message: /UTF-8/ });
  await t.rejects(readJson(folder), { code: 'ERR_QLORA_READ_FAILED', message: /regular file/ });
  await t.rejects(readJson(join(folder, 'none')), { code: 'ERR_QLORA_FILE_NOT_FOUND' });
  const fields = new Fields('ok', await readJsonObject(join(folder, 'ok')));
  t.equal(fields.string('a'), 'ü');
  t.equal(fields.number('x'), undefined, 'a prototype from the file is not looked into');
  t.equal(fields.raw('toString'), undefined);
});

t.test('a file that is half there', async (t) => {
  const source = readFileSync(join(references, 'llama', 'model.safetensors'));
  const folder = t.testdir({ 'config.json': '{}', 'model.safetensors': source.subarray(0, source.length / 2) });
  await t.rejects(openModelFolder(folder), { code: 'ERR_QLORA_SAFETENSORS', message: /beyond the end of the file/ });
  await t.resolves(openSafetensors(join(references, 'llama', 'model.safetensors')));
});
