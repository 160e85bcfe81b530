/** Configuration files and flags as options: every key, lines of wrong ones, what wins over what. */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import t from 'tap';
import { allRules, type Dialect, valueOfFlag } from '../../lib/cli/config/draft.js';
import type { Setting } from '../../lib/cli/config/file.js';
import { huggingFaceRules, optimizers } from '../../lib/cli/config/hugging-face.js';
import { llamaFactoryDefaults, llamaFactoryRules } from '../../lib/cli/config/llama-factory.js';
import { ourRules, trainerRules } from '../../lib/cli/config/options.js';
import { qloraRules } from '../../lib/cli/config/qlora.js';
import { type Configuration, locate, readConfiguration, trainerOptions } from '../../lib/cli/config/resolve.js';
import type { Rule, Rules } from '../../lib/cli/config/rules.js';
import { QLoRAError } from '../../lib/errors.js';
import { loraSchema } from '../../lib/quantized-model.js';
import { resolveTrainerOptions, schema } from '../../lib/train/options.js';
import { type Case, shared } from '../support/config-cases.js';
import { agreed, keysOfLlamaFactory, keysOfQlora } from '../support/other-programs.js';

const folder = mkdtempSync(join(tmpdir(), 'qlora-config-'));
t.teardown(() => rmSync(folder, { recursive: true }));
const data = join(folder, 'rows.jsonl');
writeFileSync(data, '');
const file = join(folder, 'train.yaml');

function read(lines: readonly string[], flags: Record<string, string> = {}, path = file): Promise<Configuration> {
  writeFileSync(path, lines.join('\n'));
  return readConfiguration(path, flagsOf(flags));
}

function flagsOf(flags: Record<string, string>, dialect: Dialect = 'qlora'): Setting[] {
  const rules = allRules(dialect);
  return Object.entries(flags).map(([key, text]) => {
    return { key, value: valueOfFlag(rules[key] as Rule, text), place: `--${key}` };
  });
}

async function failure(lines: readonly string[], flags: Record<string, string> = {}): Promise<QLoRAError> {
  try {
    await read(lines, flags);
  } catch (error) {
    if (error instanceof QLoRAError) return error;
    throw error;
  }
  throw new Error(`accepted: ${lines.join('; ')}`);
}

/** The value at a path of dots. */
const at = (options: object, path: string) =>
  path.split('.').reduce<unknown>((o, key) => (o as Record<string, unknown> | undefined)?.[key], options);

/** The first line of a file in their words, which sets nothing. */
function opening(dialect: Dialect, key?: string): string {
  if (dialect === 'qlora') return '# a file of qlora.py';
  return key === 'stage' ? 'use_unsloth: false' : 'stage: sft';
}

const ofQlora: readonly Case[] = [
  ['dataset', data, 'dataset', data],
  ['dataset_format', 'self-instruct', 'datasetFormat', 'self-instruct'],
  ['eval_dataset_size', '1024', 'evalDataset', 1024],
  ['max_train_samples', '10', 'maxTrainSamples', 10],
  ['max_eval_samples', '20', 'maxEvalSamples', 20],
  ['source_max_len', '16', 'sourceMaxLength', 16],
  ['target_max_len', '512', 'targetMaxLength', 512],
  ['train_on_source', 'true', 'trainOnSource', true],
  ['bits', '4', 'quantization.type', 'nf4'],
  ['bits', '8', 'quantization.type', 'int8'],
  ['bits', '16', 'quantization', 'none'],
  ['bits', '32', 'computeDtype', 'f32'],
  ['quant_type', 'fp4', 'quantization.type', 'fp4'],
  ['double_quant', 'false', 'quantization.doubleQuant', false],
  ['full_finetune', 'true', 'lora', 'none'],
  ['full_finetune', 'false', 'lora', undefined],
  ['lora_r', '8', 'lora.r', 8],
  ['lora_alpha', '16', 'lora.alpha', 16],
  ['lora_dropout', '0.1', 'lora.dropout', 0.1],
  ['lora_modules', 'all', 'lora.targetModules', 'all-linear'],
  ['lora_modules', 'q_proj,v_proj', 'lora.targetModules', ['q_proj', 'v_proj']],
  ['max_memory_MB', '80000', 'maxMemory', 80e9],
];

const ofLlamaFactory: readonly Case[] = [
  ['model_revision', 'main', 'revision', 'main'],
  ['finetuning_type', 'lora', 'lora.r', 8],
  ['finetuning_type', 'full', 'lora', 'none'],
  ['lora_rank', '4', 'lora.r', 4],
  ['lora_rank', '4', 'lora.alpha', 8],
  ['lora_alpha', '3', 'lora.alpha', 3],
  ['lora_dropout', '0.05', 'lora.dropout', 0.05],
  ['lora_target', 'all', 'lora.targetModules', 'all-linear'],
  ['lora_target', 'q_proj, v_proj', 'lora.targetModules', ['q_proj', 'v_proj']],
  ['additional_target', 'embed_tokens,lm_head', 'lora.modulesToSave', ['embed_tokens', 'lm_head']],
  ['use_rslora', 'true', 'lora.useRslora', true],
  ['use_dora', 'true', 'lora.useDora', true],
  ['pissa_init', 'true', 'lora.init', 'pissa'],
  ['pissa_init', 'false', 'lora.init', undefined],
  ['loraplus_lr_ratio', '16.0', 'loraPlusRatio', 16],
  ['quantization_bit', '4', 'quantization.type', 'nf4'],
  ['quantization_bit', '8', 'quantization.type', 'int8'],
  ['quantization_bit', 'null', 'quantization', 'none'],
  ['quantization_type', 'fp4', 'quantization.type', 'fp4'],
  ['double_quantization', 'false', 'quantization.doubleQuant', false],
  ['dataset', data, 'dataset', [{ source: data }]],
  ['eval_dataset', data, 'evalDataset', data],
  ['template', 'alpaca', 'template', 'alpaca-llama-factory'],
  ['template', 'llama3', 'template', 'llama3'],
  ['cutoff_len', '1024', 'maxLength', 1024],
  ['train_on_prompt', 'true', 'trainOnSource', true],
  ['mask_history', 'true', 'maskHistory', true],
  ['packing', 'true', 'packing', true],
  ['neat_packing', 'true', 'packing', true],
  ['neat_packing', 'false', 'packing', undefined],
  ['val_size', '0.1', 'evalDataset', 0.1],
  ['val_size', '0', 'evalDataset', undefined],
  ['disable_gradient_checkpointing', 'true', 'gradientCheckpointing', false],
  ['use_unsloth_gc', 'true', 'activationOffloading', true],
  ['adapter_name_or_path', 'saves/a', 'initialAdapter', 'saves/a'],
  ['export_dir', 'merged', '@exportDir', 'merged'],
];
/** Put together with others in tests of their own. */
const together = ['max_samples', 'dataset_dir'];

const dialects: readonly { dialect: Dialect; rules: Rules; cases: readonly Case[] }[] = [
  { dialect: 'qlora', rules: qloraRules, cases: [...shared, ...ofQlora] },
  { dialect: 'llama-factory', rules: llamaFactoryRules, cases: [...shared, ...ofLlamaFactory] },
];

for (const { dialect, rules, cases } of dialects) {
  t.test(`${dialect}: every key`, async (t) => {
    for (const [key, yaml, path, expected] of cases) {
      const configuration = await read([opening(dialect, key), '', `${key}: ${yaml}`]);
      const { options, resume, overwrite, exportDir } = configuration;
      const own: Record<string, unknown> = { '@resume': resume, '@overwrite': overwrite, '@exportDir': exportDir };
      const value = path.startsWith('@') ? own[path] : at(options, path);
      const byDefault = dialect === 'llama-factory' ? llamaFactoryDefaults[path] : undefined;
      t.same(value, expected ?? byDefault, `${key}: ${yaml}`);
    }
    const tried = new Set([...cases.map(([key]) => key), ...together, ...Object.keys(agreed)]);
    for (const [key, rule] of Object.entries(rules)) {
      if (rule.kind === 'refuses') {
        const error = await failure([opening(dialect, key), '', `${key}: 1`]);
        t.match(error, { code: 'ERR_QLORA_OPTION_UNSUPPORTED', detail: { option: key, place: `${file}:3` } }, key);
        t.ok(error.message.includes(rule.note), error.message);
        continue;
      }
      t.ok(tried.has(key), `${key} is tried`);
      if (rule.kind === 'agrees') {
        const [yes, no] = agreed[key] ?? [];
        t.same(
          (await read([opening(dialect, key), `${key}: ${yes}`])).options,
          (await read([opening(dialect)])).options,
          key,
        );
        const error = await failure([opening(dialect, key), '', `${key}: ${no}`]);
        t.match(error, { code: 'ERR_QLORA_OPTION_UNSUPPORTED', detail: { place: `${file}:3` } }, key);
        continue;
      }
      const error = await failure([opening(dialect, key), '', `${key}: { a: [b] }`]);
      t.match(error, { code: 'ERR_QLORA_OPTION_INVALID' }, `${key}: a wrong value`);
      t.ok(error.message.startsWith(`${file}:3: option '${key}'`), error.message);
    }
  });
}

t.test("every key of the other programs' lists is mapped, agreed with, or refused with a reason", async (t) => {
  for (const key of keysOfQlora) t.ok(Object.hasOwn(qloraRules, key), `qlora.py: ${key}`);
  for (const key of keysOfLlamaFactory) t.ok(Object.hasOwn(llamaFactoryRules, key), `LLaMA-Factory: ${key}`);
  for (const [key, rule] of Object.entries({ ...qloraRules, ...llamaFactoryRules })) {
    if (rule.kind !== 'maps') t.ok(rule.note.length > 10, `${key} has its reason`);
    else if (!rule.to.startsWith('@')) t.ok(Object.hasOwn(trainerRules, rule.to), `${key} sets ${rule.to}`);
  }
  t.ok(Object.keys(huggingFaceRules).every((key) => key in qloraRules && key in llamaFactoryRules));
});

t.test("our keys are the trainer's", async (t) => {
  const nested = (name: string) =>
    Object.keys(trainerRules).flatMap((k) => (k.startsWith(`${name}.`) ? [k.slice(name.length + 1)] : []));
  const names = new Set(Object.keys(trainerRules).map((key) => key.split('.')[0]));
  t.same([...names].sort(), Object.keys(schema.shape).sort());
  t.same(nested('lora').sort(), Object.keys(loraSchema.shape).sort());
  t.same(nested('quantization').sort(), ['blockSize', 'doubleQuant', 'skipModules', 'type']);
  t.same(nested('schedulerOptions').sort(), ['lrEnd', 'numCycles', 'power']);
  t.same(nested('ademamix').sort(), ['alpha', 'beta3']);
  for (const name of Object.values(optimizers)) t.ok(schema.shape.optimizer.safeParse(name).success, name);

  const lines = [
    'model: m', `dataset: [{ source: ${data}, maxSamples: 3, weight: 2 }, ${data}]`, 'outputDir: out', 'evalDataset: 0.1',
    'maxMemory: 1.5 GiB', 'lora:', '  r: 8', '  targetModules: /.*_proj/', '  rankPattern: { q_proj: 4 }',
    'quantization: { type: fp4, blockSize: 128, doubleQuant: false }', 'gradientCheckpointing: auto',
    'schedulerOptions: { numCycles: 2 }', 'ademamix: { beta3: 0.99 }', 'resume: true', 'exportDir: merged',
  ]; // biome-ignore format: a file
  const { options, resume, exportDir } = await read(lines);
  const expected = {
    ...{ model: 'm', outputDir: 'out', evalDataset: 0.1, maxMemory: 1.5 * 2 ** 30, gradientCheckpointing: 'auto' },
    dataset: [{ source: data, maxSamples: 3, weight: 2 }, { source: data }],
    lora: { r: 8, targetModules: '/.*_proj/', rankPattern: { q_proj: 4 } },
    quantization: { type: 'fp4', blockSize: 128, doubleQuant: false },
    ...{ schedulerOptions: { numCycles: 2 }, ademamix: { beta3: 0.99 } },
  };
  t.same([options, resume, exportDir], [expected, true, 'merged']);
  const { lora } = trainerOptions(options) as { lora: { targetModules: RegExp } };
  t.equal(String(lora.targetModules), '/.*_proj/');
  resolveTrainerOptions(trainerOptions(options));
});

t.test('what is left out in a LLaMA-Factory file means what it means there', async (t) => {
  const { options } = await read(['stage: sft']);
  t.same(options, { ...llamaFactoryDefaults, quantization: 'none', lora: { r: 8, alpha: 16 } });
  const full = (await read(['finetuning_type: full'])).options;
  t.same([full.lora, full.quantization], ['none', 'none']);
  t.notOk('lora' in (await read(['adapter_name_or_path: a'])).options, 'an adapter brings its own');
  t.same((await read(['lora_r: 8'])).options, { lora: { r: 8 } }, 'another file has our defaults');
  const { note } = await read(['model_name_or_path: m', 'cutoff_len: 512', 'stage: sft'], { batchSize: '2' });
  t.match(
    note,
    /^read as a LLaMA-Factory file \(because of cutoff_len\): what it leaves out has LLaMA-Factory's defaults: /,
  );
  t.match(note, /base not quantized/);
  t.match(note, /learningRate 0\.00005/);
  t.match(note, /lora\.alpha 16/);
  t.notMatch(note, /batchSize|maxLength/, 'what a flag or the file says is no default');
});

t.test('whose file it is: only its keys say, never flags', async (t) => {
  const theirs = { lora_rank: '8', lora_target: 'q_proj', cutoff_len: '64', val_size: '0.1', use_dora: 'true' };
  const asOurs = { lora: { r: 8, targetModules: ['q_proj'], useDora: true }, maxLength: 64, evalDataset: 0.1 };
  const alone = await readConfiguration(undefined, flagsOf(theirs));
  t.same(alone.options, asOurs, 'no file');
  t.equal(alone.note, undefined);
  for (const [name, text] of Object.entries(theirs)) {
    const { options } = await readConfiguration(undefined, flagsOf({ [name]: text }));
    t.notOk('quantization' in options || 'batchSize' in options || 'learningRate' in options, name);
  }
  for (const lines of [[], ['seed: 1'], ['lora_r: 4'], ['model_name_or_path: m'], ['outputDir: o']]) {
    const { options, note } = await read(lines, theirs);
    t.match(options, asOurs, lines.join());
    t.notOk('quantization' in options || 'learningRate' in options || note, lines.join());
  }
  for (const ours of [['outputDir: o'], ['lora: { r: 4 }'], ['lora:', '  alpha: 4'], ['learningRate: 1e-3']]) {
    const { options, note } = await read(['cutoff_len: 64', ...ours]);
    t.equal(options.maxLength, 64, 'their names are taken beside ours');
    t.notOk('quantization' in options || 'batchSize' in options || note, ours.join());
  }
  const set = [{ source: data, maxSamples: 3 }];
  t.same((await readConfiguration(undefined, flagsOf({ dataset: data, max_samples: '3' }))).options.dataset, set);
  for (const name of ['max_samples', 'dataset_dir']) {
    const needs = { code: 'ERR_QLORA_OPTION_CONFLICT', message: new RegExp(`--${name}: '${name}' needs dataset`) };
    await t.rejects(readConfiguration(undefined, flagsOf({ [name]: '3' })), needs);
  }
});

t.test('data sets of dataset_info.json', async (t) => {
  const dir = join(folder, 'sets');
  mkdirSync(dir);
  const tags = {
    role_tag: 'role',
    content_tag: 'content',
    user_tag: 'user',
    assistant_tag: 'assistant',
    system_tag: 'system',
  };
  const info = {
    a: { file_name: 'a.json' },
    b: { file_name: 'b.jsonl', formatting: 'sharegpt' },
    c: { file_name: 'c.json', formatting: 'sharegpt', columns: { messages: 'messages' }, tags },
    d: { file_name: 'd.csv', columns: { prompt: 'instruction', query: 'context', response: 'response' } },
    hub: { hf_hub_url: 'someone/rows' },
    odd: { file_name: 'e.json', columns: { prompt: 'frage', response: 'antwort' } },
    pairs: { file_name: 'p.json', ranking: true },
  };
  writeFileSync(join(dir, 'dataset_info.json'), JSON.stringify(info));
  const lines = (names: string) => [`dataset: ${names}`, `dataset_dir: ${dir}`, 'max_samples: 1000'];
  const { options } = await read(lines(`a,b, c,d,${data}`));
  t.same(options.dataset, [
    { source: join(dir, 'a.json'), format: 'alpaca', maxSamples: 1000 },
    { source: join(dir, 'b.jsonl'), format: 'sharegpt', maxSamples: 1000 },
    { source: join(dir, 'c.json'), format: 'openai', maxSamples: 1000 },
    { source: join(dir, 'd.csv'), format: 'dolly', maxSamples: 1000 },
    { source: data, maxSamples: 1000 },
  ]);
  const missing = await failure(lines('pears'));
  t.match(missing, { code: 'ERR_QLORA_DATASET_NOT_FOUND', hint: "Did you mean 'pairs'?" });
  t.ok(missing.message.startsWith(`${file}:1: 'pears'`), missing.message);
  t.match(await failure(lines('hub')), { code: 'ERR_QLORA_OPTION_UNSUPPORTED', hint: /hf download .* someone\/rows/ });
  t.match(await failure(lines('odd')), { code: 'ERR_QLORA_OPTION_UNSUPPORTED', message: /frage/ });
  t.match(await failure(lines('pairs')), { message: /ranking/ });
});

t.test('bytes with units', async (t) => {
  const sizes = { '24GB': 24e9, '1.5 MB': 1.5e6, '3kB': 3000, '512MiB': 2 ** 29, '2TiB': 2 ** 41, '1000': 1000 };
  for (const [text, bytes] of Object.entries(sizes))
    t.equal((await read([`maxMemory: ${text}`])).options.maxMemory, bytes, text);
  for (const text of ['24 apples', 'GB', '-1GB', '1e3GB'])
    t.match(await failure([`maxMemory: ${text}`]), {
      code: 'ERR_QLORA_OPTION_INVALID',
      message: /:1: option 'maxMemory'/,
    });
});

t.test('flags win over the file', async (t) => {
  const lines = ['lora:', '  r: 8', '  alpha: 4', 'learningRate: 1e-3', 'epochs: 2', 'bits: 4', 'quant_type: fp4'];
  const merged = (await read(lines, { lora_r: '32', learning_rate: '2e-5', max_steps: '10' })).options;
  t.match(merged, { lora: { r: 32, alpha: 4 }, learningRate: 2e-5, maxSteps: 10, quantization: { type: 'fp4' } });
  t.notOk('epochs' in merged, 'the other way to end a run goes with it');
  t.same((await read(lines, { bits: '8' })).options.quantization, { type: 'int8' });
  t.same((await read(lines, { quantization: 'none' })).options.quantization, 'none');
  t.same((await read(lines, { lora: 'none', bits: '16' })).options.lora, 'none');
  t.same((await read(['stage: sft', 'lora_alpha: 5'], { lora_rank: '2' })).options.lora, { r: 2, alpha: 5 });
  t.same(flagsOf({ evalDataset: '0.1', model: '7', double_quant: 'false', lora_r: 'x' }).map(({ value }) => value), [
    '0.1', '7', false, 'x',
  ]); // biome-ignore format: values
  t.equal((await readConfiguration(undefined, flagsOf({ evalDataset: '0.1' }))).options.evalDataset, 0.1);
});

t.test('what excludes each other', async (t) => {
  const cases: readonly (readonly [string[], RegExp])[] = [
    [['bf16: true', 'fp16: true'], /:2: 'fp16' and 'bf16' \(.*:1\) set the same option/],
    [['lora_r: 8', 'lora:', '  r: 16'], /:3: 'lora.r' and 'lora_r'/],
    [['full_finetune: true', 'bits: 16', 'lora_r: 8'], /:3: 'lora_r' does not go with 'full_finetune'/],
    [['quantization: none', 'bits: 4'], /:2: 'bits: 4' and quantization none/],
    [['quantization: none', 'double_quant: true'], /:2: 'double_quant' does not go with 'quantization'/],
    [['data_seed: 1', 'seed: 2'], /:1: 'data_seed' must equal seed/],
    [['eval_strategy: steps'], /:1: .* needs eval_steps/],
  ];
  for (const [lines, message] of cases) t.match(await failure(lines), { code: 'ERR_QLORA_OPTION_CONFLICT', message });
  t.equal((await read(['packing: true', 'neat_packing: true'])).options.packing, true, 'the same is no conflict');
  t.equal((await read(['eval_strategy: no', 'eval_steps: 5'])).options.evalSteps, undefined);
  t.equal((await read(['eval_strategy: steps', 'logging_steps: 5'])).options.evalSteps, 5);
});

t.test('what is wrong in a file is found with its line', async (t) => {
  const unknown = await failure(['model: m', '', '# a comment', 'lora_rnk: 8']);
  t.match(unknown, { code: 'ERR_QLORA_OPTION_UNKNOWN', hint: "Did you mean 'lora_rank'?" });
  t.ok(unknown.message.startsWith(`${file}:4:`), unknown.message);
  t.match(await failure(['lora:', '  r: 8', '  rr: 8']), {
    message: /:3: .*'lora.rr'/,
    hint: "Did you mean 'lora.r'?",
  });
  for (const [line, hint] of [
    ['lora: { rank: 8 }', "Did you mean 'lora.r'?"],
    ['lora: { lora_rank: 8 }', "Did you mean 'lora.r'?"],
    ['lora: { lora_alpha: 8 }', "Did you mean 'lora.alpha'?"],
    ['lora: { target: q_proj }', "Did you mean 'lora.targetModules'?"],
    ['quantization: { bits: 4 }', 'It takes type, blockSize, doubleQuant, skipModules.'],
    ['other.key: 8', 'docs/cli.md lists every key.'],
    ['rank: 8', "Did you mean 'lora.r'?"],
  ] as const)
    t.match(await failure([line]), { code: 'ERR_QLORA_OPTION_UNKNOWN', hint }, line);
  t.match(await failure(['learningRat: 8']), { hint: "Did you mean 'learningRate'?" });
  t.match(await failure(['model: a', 'seed: 1', 'model: b']), {
    code: 'ERR_QLORA_CONFIG_FILE',
    message: /:3: .*unique/,
  });
  t.match(await failure(['model: "a', 'seed: 1']), { code: 'ERR_QLORA_CONFIG_FILE' });
  const rows = join(folder, 'rows.csv');
  await t.rejects(read(['instruction,output', 'a,b'], {}, rows), {
    code: 'ERR_QLORA_CONFIG_FILE',
    hint: /rows go to --dataset/,
  });
  await t.rejects(read(['{"instruction": "a"}'], {}, join(folder, 'one.jsonl')), { message: /file of rows/ });
  t.match(await failure(['- a', '- b']), { code: 'ERR_QLORA_CONFIG_FILE', message: /keys and values/ });
  t.match(await failure(['optim: adafactor']), {
    code: 'ERR_QLORA_OPTION_INVALID',
    message: /:1: option 'optim'.*adafactor/,
  });
  const json = join(folder, 'train.json');
  const lines = ['{', '  "model": "m",', '  "lora": { "r": 8 },', '  "epochs": "three"', '}'];
  await t.rejects(read(lines, {}, json), { message: /train\.json:4: option 'epochs': expected number, got "three"/ });
  lines[3] = '  "epochs": 3';
  t.same((await read(lines, {}, json)).options, { model: 'm', lora: { r: 8 }, epochs: 3 });

  // What only the trainer finds wrong.
  const { options, places } = await read(['model: m', `dataset: ${data}`, 'output_dir: o', 'lora_dropout: 1.5']);
  try {
    resolveTrainerOptions(trainerOptions(options));
    t.fail('it was accepted');
  } catch (error) {
    const located = locate(error, places) as QLoRAError;
    t.equal(located.message, `${file}:4: option 'lora_dropout': expected number to be <1, got 1.5`);
  }
  const bomb = ['a: &a [x,x,x,x,x,x,x,x,x,x]', ...'bcdefghij'.split('').map((c, i) => {
    const before = 'abcdefghi'[i];
    return `${c}: &${c} [${Array(10).fill(`*${before}`).join(',')}]`;
  })]; // biome-ignore format: a bomb
  t.match(await failure(bomb), { code: /ERR_QLORA_(CONFIG_FILE|OPTION_UNKNOWN)/ });
  t.ok(Object.keys(ourRules).length > 60);
});
