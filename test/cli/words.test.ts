/** What the command line says: help, wrong words, rows explained, the machine, and its page of documentation. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import t from 'tap';
import { valueOfFlag } from '../../lib/cli/config/draft.js';
import { ourRules } from '../../lib/cli/config/options.js';
import { locate, readConfiguration, trainerOptions } from '../../lib/cli/config/resolve.js';
import type { Rule } from '../../lib/cli/config/rules.js';
import { exitCodes, exitCodesHelp } from '../../lib/cli/exit-codes.js';
import { hyphenated } from '../../lib/cli/flags.js';
import type { QLoRAError } from '../../lib/index.js';
import { resolveTrainerOptions } from '../../lib/train/options.js';
import { cli } from '../support/cli.js';
import { keyTables } from '../support/key-tables.js';
import { packageRoot } from '../support/references.js';

t.setTimeout(600_000); // a busy machine starts processes slowly
const folder = mkdtempSync(join(tmpdir(), 'qlora-words-'));
t.teardown(() => rmSync(folder, { recursive: true }));
const model = join(packageRoot(), 'examples', 'demo', 'model');
const json = (...path: string[]) => JSON.parse(readFileSync(join(...path), 'utf8'));

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

t.test('a flag says which option it is: nothing comes twice', async (t) => {
  for (const [flag, value, message] of [
    ['--optimizer', 'adam', /^--optimizer: expected one of .*, got "adam"$/],
    ['--lora-r', '0', /^--lora-r: expected number to be >=1, got 0$/],
    ['--quantization-type', 'nf5', /^--quantization-type: must be one of nf4, fp4, int8, got 'nf5'$/],
    [
      '--lora-rank-pattern',
      '{q_proj: 0}',
      /^--lora-rank-pattern: option 'lora\.rankPattern\.q_proj': expected .*, got 0$/,
    ],
    ['--batch-size', 'x', /^--batch-size: expected number, got "x"$/],
    ['--quantization', '4bit', /^--quantization: expected 'none'; 4 bits are quantization\.type nf4, .*, got "4bit"$/],
  ] as const) {
    const key = Object.keys(ourRules).find((name) => `--${hyphenated(name)}` === flag) as string;
    const given = [{ key, value: valueOfFlag(ourRules[key] as Rule, value), place: flag }];
    const error = await readConfiguration(undefined, given).then(
      (read) => {
        const all = { ...trainerOptions(read.options), model: 'm', dataset: 'd', outputDir: 'o' };
        try {
          return resolveTrainerOptions(all);
        } catch (thrown) {
          return locate(thrown, read.places);
        }
      },
      (thrown) => thrown,
    );
    t.match((error as QLoRAError).message, message, flag);
  }
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
  for (const count of ['all', '0', '1.5', '257', ' 2'])
    t.match(await cli(['doctor'], { env: { QLORA_NUM_THREADS: count } }), {
      status: 1,
      stderr: `QLORA_NUM_THREADS must be a whole number from 1 to 256, got '${count}'`,
    });
  t.match(await cli(['doctor', '--json'], { env: { QLORA_NUM_THREADS: '' } }), { status: 0 }, 'empty is not set');
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
