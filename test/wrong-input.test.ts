/** Wrong input from people: a QLoRAError that says what was expected and what came, and nothing is lost. */
import { join } from 'node:path';
import t from 'tap';
import {
  dequantize,
  type LoadOptions,
  QLoRATrainer,
  QuantizedModel,
  quantize,
  type Row,
  type TrainerOptions,
} from '../lib/index.js';
import { referencesDir } from './support/references.js';
import { refuses, use, type Wrong } from './support/refuses.js';

const tiny = join(referencesDir('models'), 'llama');

t.test('option names and values, at every door', async (t) => {
  const model = await QuantizedModel.load(tiny);
  use(model);
  const rows = [{ inputIds: [1, 2, 3] }];
  const base = { model, dataset: rows, outputDir: join(t.testdirName, 'out') };
  const trainer = await QLoRATrainer.create(base);
  const quantized = join(t.testdir(), 'quantized');
  await model.save(quantized);
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
  const meant: [string, () => unknown, RegExp][] = [
    ['adam', () => create({ optimizer: 'adam' }), /^Did you mean 'adamw_32bit'\?/],
    ['paged_adam_8bit', () => create({ optimizer: 'paged_adam_8bit' }), /'paged_adamw_8bit'/],
    ['cosin', () => create({ lrScheduler: 'cosin' }), /'cosine'/],
    ['linear_with_warmup', () => create({ lrScheduler: 'linear_with_warmup' }), /'linear'/],
    ['fp16', () => create({ computeDtype: 'fp16' }), /'f16'/],
    ['bfloat16', () => load({ computeDtype: 'bfloat16' as 'bf16' }), /'bf16'/],
    ['4bit', () => create({ quantization: '4bit' }), /^4 bits are type 'nf4'/],
    ['int4', () => load({ quantization: { type: 'int4' as 'nf4' } }), /^4 bits are type 'nf4'/],
    ['8bit', () => load({ quantization: '8bit' as 'none' }), /^8 bits are type 'int8'/],
  ];
  for (const [what, call, hint] of meant)
    await refuses(t, what, call, { code: 'ERR_QLORA_OPTION_INVALID', message: new RegExp(what), hint });
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
    [
      'device',
      () => load({ device: 'cuda:99' }),
      { code: 'ERR_QLORA_DEVICE', message: /NVIDIA driver|plugin|cuda:99/ },
    ],
    [
      'full fine-tuning of 4 bits',
      () => create({ model: tiny, lora: 'none' }),
      { code: 'ERR_QLORA_OPTION_CONFLICT', message: /lora: 'none'/ },
    ],
    [
      'full fine-tuning of a checkpoint in 4 bits',
      () => create({ model: quantized, lora: 'none', quantization: 'none' }),
      { code: 'ERR_QLORA_OPTION_CONFLICT', message: /lora: 'none'.*quantized/, hint: /in 16 bits/ },
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
  use(undefined);
  await model.dispose();
});

t.test('ids, labels and rows', async (t) => {
  const model = await QuantizedModel.load(tiny);
  use(model);
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
  use(undefined);
  await model.dispose();
});
