/** Wrong input from people and from files: a QLoRAError that says what was expected and what came, and nothing is lost. */
import { execFileSync, spawnSync } from 'node:child_process';
import { cpSync, readdirSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { constants } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import t, { type Test } from 'tap';
import {
  dequantize,
  type LoadOptions,
  memory,
  QLoRATrainer,
  QuantizedModel,
  quantize,
  type Row,
  type TrainerOptions,
} from '../lib/index.js';
import { packageRoot, referencesDir } from './support/references.js';

const tiny = join(referencesDir('models'), 'llama');
const demo = join(packageRoot(), 'examples', 'demo', 'model');

interface Wrong {
  code: string;
  message: RegExp;
  hint?: RegExp;
}

/** A model that the calls go to: what was enqueued before runs before its memory is looked at. */
let inUse: QuantizedModel | undefined;
async function liveBytes(): Promise<number | undefined> {
  await inUse?.core.stream.sync();
  return memory()[0]?.liveBytes;
}

/** The error is whole, and what was counted before is counted after. */
async function refuses(
  t: Test,
  what: string,
  call: () => unknown,
  { code, message, hint = /\w/ }: Wrong,
): Promise<void> {
  const before = await liveBytes();
  const error = await Promise.resolve()
    .then(call)
    .catch((e: unknown) => e);
  t.match(error, { name: 'QLoRAError', code, message, hint }, what);
  t.equal(await liveBytes(), before, `${what}: nothing is left in memory`);
}

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
      { code: 'ERR_QLORA_SHAPE', message: /\[100, 64\].*\[209, 64\]/ },
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
  inUse = undefined;
  await model.dispose();
});

t.test('option names and values, at every door', async (t) => {
  const model = await QuantizedModel.load(tiny);
  inUse = model;
  const rows = [{ inputIds: [1, 2, 3] }];
  const base = { model, dataset: rows, outputDir: join(t.testdirName, 'out') };
  const trainer = await QLoRATrainer.create(base);
  const create = (options: object) => QLoRATrainer.create({ ...base, ...options } as TrainerOptions);
  const load = (options: object) => QuantizedModel.load(tiny, options as LoadOptions);
  const unknown: [string, () => unknown, string, string][] = [
    ['load', () => load({ computeDtyp: 'f32' }), 'computeDtyp', 'computeDtype'],
    ['load, nested', () => load({ quantization: { blocksize: 64 } }), 'blocksize', 'blockSize'],
    [
      'quantize',
      () => quantize(new Float32Array(64), [64], { doubleQuants: true } as object),
      'doubleQuants',
      'doubleQuant',
    ],
    ['logits', () => model.logits([1], { adaptor: null } as object), 'adaptor', 'adapter'],
    ['loss', () => model.loss([1, 2], undefined, { adaptor: null } as object), 'adaptor', 'adapter'],
    ['generate', () => model.generate('a', { temprature: 1 } as object), 'temprature', 'temperature'],
    ['generateTokens', () => model.generateTokens([1], { ignoreEOS: true } as object), 'ignoreEOS', 'ignoreEos'],
    ['addLora', () => model.addLora('x', { rank: 4, alfa: 3 } as object), 'rank', ''],
    ['create', () => create({ learningrate: 1 }), 'learningrate', 'learningRate'],
    ['create, lora', () => create({ lora: { dropuot: 0.1 } }), 'lora.dropuot', 'dropout'],
    ['create, quantization', () => create({ model: tiny, quantization: { typ: 'nf4' } }), 'typ', 'type'],
    [
      'create, scheduler',
      () => create({ schedulerOptions: { numCycle: 1 } }),
      'schedulerOptions.numCycle',
      'numCycles',
    ],
    [
      'create, data sets',
      () => create({ dataset: [{ source: rows, maxSample: 1 }] }),
      'dataset.0.maxSample',
      'maxSamples',
    ],
    ['train', () => trainer.train({ signl: 1 } as object), 'signl', 'signal'],
    ['evaluate', () => trainer.evaluate(rows, { signl: 1 } as object), 'signl', 'signal'],
  ];
  for (const [what, call, option, near] of unknown) {
    const hint = near ? new RegExp(`Did you mean '${near}'`) : /It takes r, alpha/;
    await refuses(t, what, call, { code: 'ERR_QLORA_OPTION_UNKNOWN', message: new RegExp(`option '${option}'`), hint });
  }
  const invalid: [string, () => unknown, RegExp][] = [
    ['computeDtype', () => load({ computeDtype: 'fp8' }), /'computeDtype': .*bf16.*got "fp8"/],
    ['quantization', () => load({ quantization: 'nf4' }), /'quantization': .*"none".*object.*got "nf4"/],
    ['quantization.type', () => load({ quantization: { type: 'nf5' } }), /nf4, fp4, int8, got 'nf5'/],
    [
      'quantization.skipModules',
      () => load({ quantization: { skipModules: [3] } }),
      /'quantization\.skipModules\.0': expected string, got 3/,
    ],
    ['onProgress', () => load({ onProgress: 3 }), /'onProgress': expected a function, got 3/],
    ['signal', () => load({ signal: 3 }), /'signal': expected AbortSignal, got 3/],
    ['options that are none', () => load(5 as unknown as object), /its options: expected object, got 5/],
    ['r', () => model.addLora('x', { r: 0 }), /'r': .*>=1, got 0/],
    ['model', () => create({ model: 3 }), /'model': .*string.*QuantizedModel, got 3/],
    ['dataset', () => create({ dataset: 3 }), /'dataset': expected a path or rows, got 3/],
    ['maxSteps', () => create({ maxSteps: 1.5 }), /'maxSteps': expected int, got 1\.5/],
    ['lora.r', () => create({ lora: { r: 'many' } }), /'lora\.r': expected number, got "many"/],
    ['optimizer', () => create({ optimizer: 'adam' }), /'optimizer': .*sgd.*got "adam"/],
    ['temperature', () => model.generateTokens([1], { temperature: -1 }), /'temperature': .*>=0, got -1/],
  ];
  for (const [what, call, message] of invalid)
    await refuses(t, what, call, { code: 'ERR_QLORA_OPTION_INVALID', message });
  const others: [string, () => unknown, Wrong][] = [
    [
      'template',
      () => create({ template: 'alpacca' }),
      { code: 'ERR_QLORA_TEMPLATE_UNKNOWN', message: /alpacca/, hint: /Did you mean 'alpaca'/ },
    ],
    [
      'datasetFormat',
      () => create({ datasetFormat: 'sharegtp' }),
      { code: 'ERR_QLORA_DATASET_FORMAT', message: /sharegtp/, hint: /Did you mean 'sharegpt'/ },
    ],
    ['device', () => load({ device: 'cuda:0' }), { code: 'ERR_QLORA_DEVICE', message: /cuda:0/ }],
    [
      'full fine-tuning of 4 bits',
      () => create({ model: tiny, lora: 'none' }),
      { code: 'ERR_QLORA_OPTION_CONFLICT', message: /lora: 'none'/ },
    ],
    ['a name twice', () => model.addLora('default'), { code: 'ERR_QLORA_ADAPTER_EXISTS', message: /'default'/ }],
    [
      'modules that are not there',
      () => model.addLora('x', { targetModules: ['query'] }),
      { code: 'ERR_QLORA_ADAPTER_TARGETS', message: /query/, hint: /q_proj/ },
    ],
    [
      'an adapter that is not there',
      () => model.loadLora('x', '/no/such/adapter'),
      { code: 'ERR_QLORA_ADAPTER_NOT_FOUND', message: /\/no\/such\/adapter/ },
    ],
    [
      'quantize, shape',
      () => quantize(new Float32Array(63), [64]),
      { code: 'ERR_QLORA_SHAPE', message: /64 elements, got 63/ },
    ],
    ['dequantize', () => dequantize({} as never), { code: 'ERR_QLORA_OPTION_INVALID', message: /./ }],
  ];
  for (const [what, call, wrong] of others) await refuses(t, what, call, wrong);
  t.same([...model.adapters.keys()], ['default'], 'no half-made adapter stays');
  await trainer.dispose();
  inUse = undefined;
  await model.dispose();
});

t.test('ids, labels and rows', async (t) => {
  const model = await QuantizedModel.load(tiny);
  inUse = model;
  const outputDir = join(t.testdirName, 'out');
  const token = (message: RegExp) => ({ code: 'ERR_QLORA_TOKEN_ID', message });
  for (const bad of [209, -1, 1.5, Number.NaN, 2 ** 32 + 1]) {
    await refuses(t, `logits of ${bad}`, () => model.logits([1, bad]), token(/inputIds\[1\].*0 to 208.*got/));
    await refuses(t, `loss of ${bad}`, () => model.loss([1, bad]), token(/\[\d\].*0 to 208/));
    await refuses(t, `a label ${bad}`, () => model.loss([1, 2], [1, bad]), token(/labels\[0\].*0 to 208.*got/));
    await refuses(t, `generateTokens from ${bad}`, () => model.generateTokens([bad]), token(/inputIds\[0\]/));
  }
  await refuses(t, 'no ids', () => model.logits([]), {
    code: 'ERR_QLORA_ARGUMENT',
    message: /at least one id, got none/,
  });
  await refuses(t, 'no targets', () => model.loss([1, 2], [1, -100]), {
    code: 'ERR_QLORA_NO_TARGETS',
    message: /other than -100/,
  });
  await refuses(t, 'labels of another length', () => model.loss([1, 2], [1]), {
    code: 'ERR_QLORA_SHAPE',
    message: /2, got 1/,
  });
  const trainer = await QLoRATrainer.create({ model, dataset: [{ inputIds: [1, 2, 3] }], outputDir });
  const rows: [string, unknown, Wrong][] = [
    ['an id beyond the vocabulary', { inputIds: [1, 209] }, token(/row 2: inputIds\[1\].*208.*got 209/)],
    ['a label beyond it', { inputIds: [1, 2], labels: [1, 400] }, token(/row 2: labels.*got 400/)],
    [
      'no target token',
      { inputIds: [1, 2], labels: [-100, -100] },
      { code: 'ERR_QLORA_NO_TARGETS', message: /row 2.*every label is -100/ },
    ],
    ['too short', { inputIds: [1] }, { code: 'ERR_QLORA_NO_TARGETS', message: /row 2.*1 token / }],
    [
      'unknown fields',
      { question: 'x', answer: 'y' },
      { code: 'ERR_QLORA_ROW_INVALID', message: /Row 2.*question, answer/ },
    ],
    ['no object', 'text', { code: 'ERR_QLORA_ROW_INVALID', message: /Row 2.*a string/ }],
    ['text without a tokenizer', { text: 'x' }, { code: 'ERR_QLORA_TOKENIZER_MISSING', message: /row 2/i }],
  ];
  for (const [what, row, wrong] of rows) {
    const dataset = [{ inputIds: [1, 2] }, row as Row];
    await refuses(t, what, () => trainer.trainStep(dataset), wrong);
    await refuses(t, `${what}, evaluated`, () => trainer.evaluate(dataset), wrong);
    await refuses(t, `${what}, at create`, () => QLoRATrainer.create({ model: tiny, dataset, outputDir }), wrong);
  }
  await refuses(t, 'no rows', () => trainer.trainStep([]), { code: 'ERR_QLORA_DATASET_EMPTY', message: /no rows/ });
  await refuses(t, 'no file', () => trainer.evaluate('/no/such.jsonl'), {
    code: 'ERR_QLORA_DATASET_NOT_FOUND',
    message: /\/no\/such\.jsonl/,
  });
  t.ok((await trainer.trainStep([{ inputIds: [1, 2, 3] }])).loss > 0, 'and training goes on');
  await trainer.dispose();
  inUse = undefined;
  await model.dispose();
});

t.test("another model's adapter, a damaged one", async (t) => {
  const other = await QuantizedModel.load(demo);
  other.addLora('x', { r: 2 });
  await other.adapters.get('x')?.save(join(t.testdir(), 'adapter'));
  const folder = join(t.testdirName, 'adapter');
  await other.dispose();
  const model = await QuantizedModel.load(tiny);
  inUse = model;
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
  inUse = undefined;
  await model.dispose();
});

const compiler = ['c++', 'g++', 'clang++'].find((name) => spawnSync(name, ['--version']).status === 0);
const cannotInject = process.platform !== 'linux' ? 'needs LD_PRELOAD' : compiler ? false : 'needs a C++ compiler';

t.test('a full disk while an adapter or a model is saved', { skip: cannotInject }, async (t) => {
  const folder = t.testdir({ out: {} });
  const library = join(folder, 'fail_io.so');
  const source = join(packageRoot(), 'test', 'support', 'fail_io.cpp');
  execFileSync(compiler as string, ['-shared', '-fPIC', '-O1', '-o', library, source, '-ldl']);
  const child = fileURLToPath(new URL('./support/save-model-child.js', import.meta.url));
  for (const what of ['adapter', 'model']) {
    const result = spawnSync(process.execPath, [child, what, demo, join(folder, 'out', what)], {
      encoding: 'utf8',
      env: { ...process.env, LD_PRELOAD: library, FAIL_WITH: String(constants.errno.ENOSPC) },
    });
    t.equal(result.status, 0, result.stderr);
    const outcomes = JSON.parse(result.stdout) as {
      code: string;
      hint: string;
      name: string;
      whole: boolean;
      same: boolean;
      files: string[];
    }[];
    t.ok(outcomes.length >= 4, `${what}: ${outcomes.length} places to fail`);
    for (const outcome of outcomes) {
      t.match(outcome, { name: 'QLoRAError', code: 'ERR_QLORA_DISK_FULL', hint: /Free space/ });
      t.ok(outcome.whole, 'every file that was there is whole');
      t.ok(outcome.same, 'the model computes what it did');
      t.notOk(
        outcome.files.some((name) => name.includes('tmp')),
        'no temporary file',
      );
    }
    t.notOk(readdirSync(join(folder, 'out', what)).some((name) => name.includes('tmp')));
  }
});
