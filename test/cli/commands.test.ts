/** The commands in processes of their own, on the demo's model. */
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import t from 'tap';
import { exitCodes, exitCodesHelp } from '../../lib/cli/exit-codes.js';
import { QuantizedModel } from '../../lib/index.js';
import { cli } from '../support/cli.js';
import { keyTables } from '../support/key-tables.js';
import { packageRoot } from '../support/references.js';

t.setTimeout(600_000); // a busy machine trains slowly
const folder = mkdtempSync(join(tmpdir(), 'qlora-cli-'));
t.teardown(() => rmSync(folder, { recursive: true }));
const model = join(packageRoot(), 'examples', 'demo', 'model');
const data = join(folder, 'double.jsonl');
const rows = Array.from({ length: 50 }, (_, n) => ({ instruction: `Double ${n}.`, output: `${2 * n}` }));
writeFileSync(data, rows.map((row) => JSON.stringify(row)).join('\n'));
const json = (...path: string[]) => JSON.parse(readFileSync(join(...path), 'utf8'));

const config = join(folder, 'train.yaml');
writeFileSync(
  config,
  `
model: ${model}
dataset: ${data}
outputDir: ${join(folder, 'ours')}
evalDataset: 5
lora: { r: 16, alpha: 16, targetModules: '/.*(q|v|up|down)_proj/' }
batchSize: 16
gradientAccumulationSteps: 1
maxSteps: 24
loggingSteps: 10
learningRate: 4e-3
`,
);

t.test('help, and wrong words', async (t) => {
  // With such an instruction set the addon cannot be loaded: help needs none.
  const env = { QLORA_CPU: 'none' };
  const help = await cli(['--help'], { env });
  t.equal(help.status, 0, help.stderr);
  const commands = 'train resume plan explain generate chat quantize merge info compare doctor';
  for (const name of commands.split(' ')) t.match(help.stdout, new RegExp(`^  ${name} +\\S`, 'm'), name);
  t.match(help.stdout, /^ {2}75 +stopped with a checkpoint/m);
  const ofTrain = await cli(['train', '--help'], { env });
  t.equal(ofTrain.status, 0);
  for (const flag of [
    '--lora-r <value>',
    '--group-by-length [value]',
    '--max-memory <value>',
    '--print-config',
    '--json',
  ])
    t.ok(ofTrain.stdout.includes(`  ${flag} `), flag);
  t.notMatch(ofTrain.stdout, /^ +--lora_r /m, 'other names are not shown');
  t.match((await cli(['--version'], { env })).stdout, json(packageRoot(), 'package.json').version);

  t.match(await cli(['trian'], { env }), { status: 2, stdout: '', stderr: /Did you mean 'train'\?/ });
  t.match(await cli(['train', '--lora_rnk', '3'], { env }), { status: 2, stderr: /'--lora_rnk'[\s\S]*'--lora_rank'/ });
  t.match(await cli(['train', '--rank', '8'], { env }), {
    status: 2,
    stderr: /'--rank'[\s\S]*Did you mean '--lora-r'\?/,
  });
  const nothing = await cli(['train', '--json'], { env });
  t.equal(nothing.status, 2);
  t.match(JSON.parse(nothing.stderr), {
    type: 'error',
    code: 'ERR_QLORA_OPTION_INVALID',
    message: /model, dataset, outputDir/,
    hint: /--output-dir/,
  });
  t.match(await cli(['info', '--no-such'], { env }), { status: 2 });
  t.match(await cli([], { env }), { status: 2, stderr: /Usage: qlora-node/ });
  const doctor = await cli(['doctor'], { env });
  t.match(doctor, { status: 1, stdout: /^node +v/m, stderr: /^code: ERR_QLORA_(CPU|ADDON)$/m }, 'but doctor does');
  t.notMatch(doctor.stderr, / at .*\.js:/, 'no stack');
  t.match((await cli(['doctor'], { env: { ...env, DEBUG: '1' } })).stderr, / at .*\.js:/, 'but with DEBUG');
});

t.test('train, and what can be done with an adapter', async (t) => {
  const plain = await cli(['train', config]);
  t.equal(plain.status, 0, plain.stderr);
  t.equal(plain.stderr, '');
  const steps = plain.lines.filter((line) => line.startsWith('step ') && line.includes('tok/s'));
  t.same(
    steps.map((line) => /^step (\d+\/\d+)/.exec(line)?.[1]),
    ['10/24', '20/24', '24/24'],
    'a line a logging step',
  );
  t.match(steps[0] as string, /loss \d+\.\d+ {2}lr 4\.00e-3 {2}[\d,]+ tok\/s {2}[\d.]+ MB {2}left /);
  t.ok(
    plain.lines.some((line) => /^using .*50.* rows of .*double\.jsonl/.test(line)),
    plain.stdout,
  );
  t.match(plain.stdout, /^step 24: eval loss \d/m);
  t.match(plain.stdout, /^done: 24 steps, loss \d.*ours$/m);
  t.notMatch(plain.stdout, '\u001b', 'nothing for terminals');
  const adapter = join(folder, 'ours');
  t.match(json(adapter, 'adapter_config.json'), { r: 16, lora_alpha: 16 });
  t.match(json(adapter, 'run.json'), { options: { dataset: data, lora: { targetModules: '/.*(q|v|up|down)_proj/' } } });

  const again = await cli(['train', config]);
  t.match(again, {
    status: 2,
    stderr: /ours holds an earlier run[\s\S]*--resume.*--overwrite[\s\S]*ERR_QLORA_OUTPUT_EXISTS/,
  });

  t.test('generate', async (t) => {
    const ask = ['generate', model, '--adapter', adapter];
    t.match(await cli([...ask, '--instruction', 'Double 21.']), { status: 0, stdout: '42\n', stderr: '' });
    const prompt =
      'Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\nDouble 21.\n\n### Response: ';
    t.match(await cli(ask, { stdin: prompt }), { status: 0, stdout: '42\n' }, 'a prompt from standard input');
    // The base tells prompts apart by their last newline.
    const say = async (stdin: string) => (await cli(['generate', model, '--max-new-tokens', '8'], { stdin })).stdout;
    const [bare, one, two] = [
      await say('Double 21.\n\nThe'),
      await say('Double 21.\n\nThe\n'),
      await say('Double 21.\n\nThe\n\n'),
    ];
    t.equal(one, bare, 'without its last newline');
    t.not(two, bare, 'but no more than one is taken off');
    t.match(await cli([...ask, prompt, '--max_new_tokens', '1']), { status: 0, stdout: '4\n' });
    t.match(await cli([...ask, prompt, '--stop', 'x', '--stop', '2']), { status: 0, stdout: '4\n' });
    const { objects } = await cli([...ask, '--instruction', 'Double 21.', '--json']);
    t.same(objects.at(-1), { type: 'result', text: '42' });
    const pieces = objects.slice(0, -1);
    t.ok(pieces.length > 1 && pieces.every(({ type }) => type === 'text'));
    t.equal(pieces.map(({ text }) => text).join(''), '42');
    t.match(await cli([...ask, prompt, '--instruction', 'x']), { status: 2, stderr: /ERR_QLORA_OPTION_CONFLICT/ });
    t.match(await cli([...ask, prompt, '--top_k', 'many']), {
      status: 2,
      stderr: /--top_k: option 'top_k': expected[\s\S]*hint: .*generate --help.*docs\/cli\.md say what each takes/,
    });
    t.match(await cli(['generate', join(folder, 'none'), 'x']), { status: 1, stderr: /ERR_QLORA_MODEL_NOT_FOUND/ });
  });

  t.test('an adapter in place of a model, and a run that was stopped', async (t) => {
    t.match(await cli(['generate', adapter, 'x']), { status: 1, stderr: /^hint: .*give this one as --adapter\.$/m });
    const stopped = join(folder, 'stopped');
    const run = ['train', config, '--output-dir', stopped, '--max-steps', '3', '--save-steps', '2'];
    t.match(await cli(run), { status: 0 });
    rmSync(join(stopped, 'adapter_config.json'));
    const hint = new RegExp(
      `^hint: This run was stopped: its newest adapter is ${stopped}/checkpoint-\\d+; .qlora-node resume ${stopped}. goes on`,
      'm',
    );
    for (const ask of [
      ['generate', model, 'x', '--adapter', stopped],
      ['merge', model, stopped, join(folder, 'not')],
      ['chat', model, '--adapter', stopped],
    ])
      t.match(await cli(ask), { status: 1, stderr: hint }, `${ask[0]}`);
  });

  t.test('chat', async (t) => {
    const lines = ['Double 21.', '/adapter off', '/reset', 'What is 3 plus 4?', '/adaptr', '/adapter no', '/reset', '/adapter twice', 'Double 30.', '/adapter', '/exit', 'never']; // biome-ignore format: a talk
    const talk = await cli(['chat', model, '--adapter', `twice=${adapter}`], { stdin: lines.join('\n') });
    t.equal(talk.status, 0, talk.stderr);
    t.same(talk.lines, ['42', '(the base speaks)', '(a new beginning)', '7', '(a new beginning)', '(twice speaks)', '60', '(loaded: twice; twice speaks)']); // biome-ignore format: a talk
    t.match(talk.stderr, /there is no \/adaptr\nhint: Did you mean '\/adapter'\?/);
    t.match(talk.stderr, /no adapter 'no' is loaded\nhint: Loaded: twice/);
    // The second question comes after the first one's answer, which changes what the base says to it.
    const [first, second] = ['What is 12 plus 30?', 'Repeat it.'] as const;
    const history = await cli(['chat', model, '--json', '--max-new-tokens', '12'], {
      stdin: `${first}\n${second}\n/load broken ${folder}\n`,
    });
    const answers = history.objects.filter(({ type }) => type === 'answer');
    t.match(answers[0], { text: '42', adapter: null });
    await using loaded = await QuantizedModel.load(model);
    const question = { role: 'user', content: second } as const;
    const talked = [{ role: 'user', content: first }, { role: 'assistant', content: '42' }, question] as const;
    const expected = await loaded.generate([...talked], { maxNewTokens: 12 });
    t.equal(answers[1]?.text, expected, 'what was said is part of the prompt');
    t.not(expected, await loaded.generate([question], { maxNewTokens: 12 }), 'and counts');
    t.match(JSON.parse(history.stderr), { code: 'ERR_QLORA_ADAPTER_NOT_FOUND' });
    t.equal(history.status, 0, 'the end of its input ends it');
  });

  t.test('info', async (t) => {
    await using loaded = await QuantizedModel.load(model);
    const [facts] = (await cli(['info', model, '--json'])).objects;
    t.match(facts, {
      type: 'model',
      family: 'llama',
      layers: 4,
      hiddenSize: 192,
      parameters: 1_722_048,
      storedIn: 'BF16',
    });
    t.equal(facts?.bytesIn4Bit, loaded.sizeBytes, 'the size that the model has');
    t.equal(facts?.bytesIn16Bit, 2 * 1_722_048);
    const text = await cli(['info', model]);
    t.match(text.stdout, /^weights in 4 bits +1\.04 MB$/m);
    t.match(text.stdout, /^model\.layers\.\*\.mlp\.gate_proj +512 x 192 +4$/m);
    const [ofAdapter] = (await cli(['info', adapter, '--json'])).objects;
    const { trainableParameters } = await loaded.loadLora('a', adapter);
    t.match(ofAdapter, {
      type: 'adapter',
      r: 16,
      alpha: 16,
      baseModel: model,
      template: 'alpaca',
      parameters: trainableParameters,
    });
    t.match(await cli(['info', folder]), { status: 1, stderr: /ERR_QLORA_MODEL_NOT_FOUND/ });

    const quantized = join(folder, 'quantized');
    const [result] = (await cli(['quantize', model, quantized, '--json'])).objects;
    t.same(result, { type: 'result', outputDir: quantized, sizeBytes: loaded.sizeBytes });
    const [again] = (await cli(['info', quantized, '--json'])).objects;
    t.same({ ...again, storedIn: 'BF16' }, facts, 'the same model');
    t.equal(again?.storedIn, 'bitsandbytes nf4');
  });

  t.test('merge', async (t) => {
    const merged = join(folder, 'merged');
    const [result] = (await cli(['merge', model, adapter, merged, '--json'])).objects;
    t.match(result, { type: 'result', outputDir: merged });
    t.ok((result?.logitDrift as number) < 0.5, `${result?.logitDrift}`);
    t.match(await cli(['generate', merged, '--instruction', 'Double 21.']), { status: 0, stdout: '42\n' });
    t.match(await cli(['merge', model, adapter, merged]), { stderr: /ERR_QLORA_OUTPUT_EXISTS/ });
  });
});

t.test("train from a LLaMA-Factory file, in objects, and from qlora.py's flags", async (t) => {
  const file = join(folder, 'lf.yaml');
  const merged = join(folder, 'lf-merged');
  const lines = [
    `model_name_or_path: ${model}`, 'stage: sft', 'do_train: true', 'finetuning_type: lora', 'lora_rank: 4',
    'lora_target: q_proj,v_proj', 'quantization_bit: 4', `dataset: ${data}`, 'template: alpaca', 'max_samples: 20',
    `output_dir: ${join(folder, 'lf')}`, 'per_device_train_batch_size: 5', 'gradient_accumulation_steps: 1',
    'num_train_epochs: 2', 'learning_rate: 1.0e-3', 'lr_scheduler_type: cosine', `export_dir: ${merged}`,
  ]; // biome-ignore format: a file
  writeFileSync(file, lines.join('\n'));
  const { status, objects, stderr } = await cli(['train', file, '--json']);
  t.equal(status, 0, stderr);
  const steps = objects.filter(({ type }) => type === 'step');
  t.same(
    steps.map(({ step }) => step),
    [1, 2, 3, 4, 5, 6, 7, 8],
    '20 rows, 2 epochs, every step',
  );
  t.ok(
    steps.every((s) =>
      ['epoch', 'loss', 'learningRate', 'gradNorm', 'tokensPerSecond', 'memoryBytes'].every((k) =>
        Number.isFinite(s[k]),
      ),
    ),
  );
  t.match(objects[0], { type: 'log', message: /^read as a LLaMA-Factory file \(because of stage\)/ });
  t.match(
    (await cli(['train', file, '--print-config'])).lines[0],
    /^# read as a LLaMA-Factory file .*: warmupRatio 0, maxGradNorm 1/,
  );
  t.ok(objects.some(({ type, message }) => type === 'log' && /using 20 /.test(String(message))));
  t.match(
    objects.filter(({ type }) => type === 'result'),
    [{ steps: 8, stopped: false, outputDir: join(folder, 'lf') }],
  );
  t.match(objects.at(-1), { type: 'log', message: /^merged into .*lf-merged/ });
  const trained = json(folder, 'lf', 'adapter_config.json');
  t.match(trained, { r: 4, lora_alpha: 8 }, 'alpha is twice the rank');
  t.same(trained.target_modules, ['q_proj', 'v_proj']);
  t.equal(json(folder, 'lf', 'qlora_node.json').template, 'alpaca-llama-factory');
  t.equal((await cli(['generate', merged, 'a', '--max-new-tokens', '1'])).status, 0, 'the export is a model');
  const late = await cli(['train', file, '--output-dir', join(folder, 'late')]);
  t.match(late, { status: 2, stderr: /lf-merged must be a new or an empty folder/ });
  t.same(readdirSync(join(folder, 'late')), ['run.json'], 'nothing was trained to find that');

  const flags = ['--model_name_or_path', model, '--dataset', data, '--output_dir', join(folder, 'flags'), '--lora_r', '2', '--lora-modules=all', '--max_steps', '1', '--per_device_train_batch_size', '2', '--gradient_accumulation_steps', '1', '--double_quant', 'False', '--bf16']; // biome-ignore format: a command
  const shown = await cli(['train', ...flags, '--print-config', '--json']);
  t.match(shown.objects, [
    {
      model,
      lora: { r: 2, targetModules: 'all-linear' },
      quantization: { doubleQuant: false },
      computeDtype: 'bf16',
      batchSize: 2,
      weightDecay: 0,
    },
  ]);
  t.equal((await cli(['train', ...flags])).status, 0);
  t.match(json(folder, 'flags', 'adapter_config.json'), { r: 2 });
  const asFile = join(folder, 'printed.yaml');
  writeFileSync(asFile, (await cli(['train', ...flags, '--print-config'])).stdout);
  t.same((await cli(['train', asFile, '--print-config', '--json'])).objects, shown.objects, 'what is shown is a file');

  for (const [line, message] of [
    ['lora_rnk: 3', /lf\.yaml:18: there is no option 'lora_rnk'\nhint: Did you mean 'lora_rank'\?/],
    [
      'trust_remote_code: true',
      /lf\.yaml:18: trust_remote_code: true is not supported: no code of a model is ever run/,
    ],
    ['warmup_ratio: 1.5', /lf\.yaml:18: 'warmup_ratio': .*got 1\.5/],
    ['seed: [', /lf\.yaml:\d+: /],
  ] as const) {
    writeFileSync(file, [...lines, line].join('\n'));
    t.match(await cli(['train', file, '--overwrite']), { status: 2, stderr: message }, line);
  }
});

t.test('plan', async (t) => {
  const [plan] = (await cli(['plan', config, '--json'])).objects as Record<string, number>[];
  t.equal(plan?.type, 'plan');
  for (const name of ['weights', 'adapters', 'optimizer', 'activations', 'scratch'])
    t.ok((plan?.[name] as number) > 0 && (plan?.[name] as number) <= (plan?.total as number), name);
  const twice = await cli(['plan', config, '--lora-r', '32', '--json']);
  t.equal(twice.objects[0]?.adapters, 2 * (plan?.adapters as number), 'flags count');
  t.match((await cli(['plan', config])).stdout, /^total +[\d.]+ MB$/m);
  const above = await cli(['plan', config, '--max-memory', '1MB', '--json']);
  const [paged] = above.objects as Record<string, number>[];
  t.match(paged, { type: 'plan', adapters: plan?.adapters }, 'it is shown all the same');
  t.equal(above.status, 1);
  t.match(JSON.parse(above.stderr), {
    code: 'ERR_QLORA_MEMORY_PLAN',
    message: /maxMemory is 1 MB/,
    hint: /Even with batchSize: 1 .*Raise maxMemory|would fit/,
  });
  const advised = await cli(['plan', config, '--max-memory', `${(paged?.total as number) - 1000}`]);
  t.match(advised, { status: 1, stdout: /^total /m, stderr: /^hint: Any of these would fit: .*batchSize: 8/m });
  t.match(await cli(['plan', config, '--max-memory', `${plan?.total}`]), { status: 0, stderr: '' });
  const small = await cli(['train', config, '--max-memory', '1MB', '--output-dir', join(folder, 'small')]);
  t.match(small, { status: 1, stderr: /^code: ERR_QLORA_/m });
});

t.test('compare', async (t) => {
  const page = join(folder, 'compare.html');
  const runs = [join(folder, 'ours'), join(folder, 'lf')];
  t.same((await cli(['compare', ...runs, '--out', page, '--json'])).objects, [{ type: 'result', file: page }]);
  t.match(readFileSync(page, 'utf8'), /ours[\s\S]*lf/);
  t.match(await cli(['compare', folder, ...runs, '--out', page]), { status: 1, stderr: /ERR_QLORA_RUN_NOT_FOUND/ });
});

t.test('explain', async (t) => {
  const long = join(folder, 'long.jsonl');
  writeFileSync(
    long,
    `${JSON.stringify({ instruction: 'Double 21.', output: '42' })}\n${JSON.stringify({ text: `\u001b[31m${'a b '.repeat(40)}` })}\n`,
  );
  const ask = ['explain', long, '--model', model];
  const plain = await cli([...ask, '--max-length', '60']);
  t.equal(plain.status, 0, plain.stderr);
  t.match(plain.stdout, /row 1 of .*long\.jsonl \(line 1\): \d+ tokens, 3 trained\n/);
  t.match(plain.stdout, /### Response: «42<\/s>»/);
  t.match(plain.stdout, /row 2 .* 60 tokens, 60 trained, \d+ cut\n/);
  t.notMatch(plain.stdout, '\u001b', "neither colours nor the data's own");
  t.match((await cli([...ask, '--color'])).stdout, '\u001b[32m42</s>\u001b[39m');
  t.match(
    (await cli([...ask, '--color', '--rows', '1'], { env: { NO_COLOR: '1' } })).stdout,
    '\u001b[32m',
    'a flag wins',
  );
  const { objects } = await cli([...ask, '--json', '--skip', '1', '--train-on-source']);
  t.match(objects[0], { type: 'row', row: 2, line: 2, truncated: 0 });
  t.match(await cli(['explain', long]), { status: 2, stderr: /missing: model/ });
});

t.test('doctor', async (t) => {
  const plain = await cli(['doctor']);
  t.equal(plain.status, 0, plain.stderr);
  for (const line of [
    /^node +v\d/m,
    /^cores +\d/m,
    /^addon +\/.*\.node$/m,
    /^cpu +\S/m,
    /^ +.*path:[\w-]+ threads:\d+ chosen:(for \w+ family \d+ model \d+: .+|as the best that runs here|by QLORA_CPU)$/m,
    /^cuda +not available: /m,
  ])
    t.match(plain.stdout, line);
  const forced = { QLORA_NUM_THREADS: '1', QLORA_CPU: 'scalar' };
  const [facts] = (await cli(['doctor', '--json'], { env: forced })).objects;
  t.match(facts, {
    type: 'doctor',
    QLORA_NUM_THREADS: '1',
    available: [{ device: 'cpu' }],
    unavailable: [{ kind: 'cuda', hint: /\S/ }],
  });
  t.match(JSON.stringify(facts), '"path:scalar","threads:1","chosen:by QLORA_CPU"');
});

t.test('docs/cli.md has the tables that the code has', async (t) => {
  const page = readFileSync(join(packageRoot(), 'docs', 'cli.md'), 'utf8').split('\n');
  for (const { head, rows } of keyTables) {
    const begin = page.indexOf(head);
    t.ok(begin >= 0, `${head}: node dist/test/support/key-tables.js prints the tables`);
    const end = page.indexOf('', begin);
    t.same(page.slice(begin + 2, end), rows, head);
  }
  const codes = page.flatMap((line) => /^\| (\d+) \|/.exec(line)?.[1] ?? []).map(Number);
  t.same(codes, Object.values(exitCodes));
  for (const code of codes) t.match(exitCodesHelp, new RegExp(`^ {2}${code} +\\S`, 'm'));
});
