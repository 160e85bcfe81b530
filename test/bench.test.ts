/** The benches' own interface: fields, types, and shares that can be. Nothing here says how fast anything is. */
import { spawnSync } from 'node:child_process';
import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import t, { type Test } from 'tap';
import { makeModel } from '../bench/make-model.js';
import { QuantizedModel } from '../lib/quantized-model.js';
import { Tokenizer } from '../lib/tokenizer/tokenizer.js';

const main = fileURLToPath(new URL('../bench/main.js', import.meta.url));
const scratch = t.testdir({ temporary: {} });
const temporary = join(scratch, 'temporary');
const model = join(scratch, 'tiny');
await makeModel('tiny', model);

function run(...args: string[]) {
  const { stdout, stderr, status } = spawnSync(process.execPath, [main, ...args], {
    encoding: 'utf8',
    env: { ...process.env, TMPDIR: temporary },
  });
  return { stdout, stderr, status };
}

type Fields = Record<string, unknown>;

/** Each line of --json; all have the fields of the machine. */
function measurements(t: Test, ...args: string[]): Fields[] {
  const { stdout, stderr, status } = run(...args, '--json');
  t.equal(status, 0, stderr);
  const lines = stdout
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line) as Fields);
  for (const line of lines) {
    t.match(line, { bench: args[0], cpu: String, threads: Number, path: String, cpuFlags: Array });
    t.match(line, { rooflineGflops: Number, readGigabytesPerSecond: Number });
    for (const field of ['share', 'prefillShare']) {
      const share = line[field];
      if (share !== undefined) t.ok((share as number) > 0 && (share as number) < 1.2, `${field} ${share}`);
    }
  }
  return lines;
}

t.test('matmul', async (t) => {
  const lines = measurements(t, 'matmul', '--m', '1,40', '--shape', '512x1024', '--seconds', '0.01');
  t.match(
    lines,
    [1, 1, 40, 40].map((m, i) => ({
      m,
      n: 1024,
      k: 512,
      direction: i % 2 ? 'backward' : 'forward',
      ms: Number,
      share: Number,
    })),
  );
});

t.test('attention', async (t) => {
  const lines = measurements(t, 'attention', '--sequence', '64', '--head-size', '64', '--heads', '8', '--seconds', '0');
  t.match(lines, [
    { sequence: 64, headSize: 64, direction: 'forward', ms: Number, share: Number },
    { direction: 'backward' },
  ]);
});

t.test('train, generate, load', async (t) => {
  const on = ['--model', model];
  t.match(measurements(t, 'train', ...on, '--sequence', '128', '--checkpointing', 'off', '--steps', '1'), [
    {
      model: 'tiny',
      batch: 1,
      sequence: 128,
      checkpointing: 'off',
      tokensPerSecond: Number,
      peakRssBytes: Number,
      share: Number,
      hostShare: Number,
      eventLoopDelayP99Ms: Number,
      minorFaultsPerStep: Number,
    },
  ]);
  t.match(measurements(t, 'generate', ...on, '--adapter', '--prefill', '64', '--new', '24', '--runs', '1'), [
    { decodeTokensPerSecond: Number, prefillTokensPerSecond: Number, share: Number },
  ]);
  t.match(measurements(t, 'load', '--preset', 'tiny'), [{ seconds: Number, peakRssBytes: Number, share: Number }]);
  t.same(readdirSync(temporary), [], 'what they made is gone');
});

t.test('a table for people, and what is asked for wrongly', async (t) => {
  const { stdout } = run('load', '--model', model, '--runs', '1');
  const [title, head, row, ...rest] = stdout.trim().split('\n') as [string, string, string];
  t.match(title, /^load: /);
  t.equal(head.length, row.length, 'columns are aligned');
  t.match(row, /^ +tiny .* MB .*%$/);
  t.same(rest, []);
  for (const [args, message] of [
    [['matmull'], /^there is no bench 'matmull'; there are roofline, matmul, /],
    [['matmul', '--m', '1,x'], /^--m must be a whole number above 0, got 'x'/],
    [['train', '--model', model, '--checkpointing', 'yes'], /^--checkpointing must be one of on, off, auto/],
    [['load', '--preset', 'gpt'], /^--preset must be one of tiny, tiny-qwen2, smollm-135m/],
    [['load', '--modle', 'x'], /Unknown option '--modle'/],
    [['load', '--model', '/no/such'], /there is no such folder/],
  ] as const) {
    const { stderr, status } = run(...args);
    t.equal(status, 1);
    t.match(stderr, message);
    t.notMatch(stderr, /\n +at /, 'no stack');
  }
});

t.test('models with random weights', async (t) => {
  const qwen2 = join(t.testdir(), 'qwen2');
  await makeModel('tiny-qwen2', qwen2, 3);
  for (const [folder, layers] of [
    [model, 2],
    [qwen2, 3],
  ] as const) {
    await using loaded = await QuantizedModel.load(folder);
    t.equal(loaded.core.weights.linears.length, 7 * layers);
    const logits = await loaded.logits([1, 2, 3]);
    t.ok(logits.every(Number.isFinite));
    t.ok(new Set(logits).size > 1000, 'weights differ');
  }
  const tokenizer = await Tokenizer.load(model);
  const text = 'Zwölf "Äpfel"\n\tund 🍎';
  const ids = tokenizer.encode(text);
  t.equal(ids.length, Buffer.byteLength(text), 'a token a byte');
  t.equal(tokenizer.decode(ids), text);
  t.equal(tokenizer.eosTokenId, 257);
});
