/** The benches' own interface: fields, types, and what shares are of. Nothing here says how fast anything is. */
import { spawnSync } from 'node:child_process';
import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import t, { type Test } from 'tap';
import { makeModel } from '../bench/make-model.js';
import { confirmedBest, type RooflineFields } from '../bench/roofline.js';
import { QuantizedModel } from '../lib/quantized-model.js';
import { Tokenizer } from '../lib/tokenizer/tokenizer.js';

const main = fileURLToPath(new URL('../bench/main.js', import.meta.url));
const scratch = t.testdir({ temporary: {} });
const temporary = join(scratch, 'temporary');
const model = join(scratch, 'tiny');
await makeModel('tiny', model);

const unread = 'QLORA_CORES is set, and no bench reads it\n';

/** On one thread: any machine has as many. */
function run(...args: string[]) {
  const { stdout, stderr, status } = spawnSync(process.execPath, [main, ...args], {
    encoding: 'utf8',
    env: { ...process.env, TMPDIR: temporary, QLORA_NUM_THREADS: '1', QLORA_CORES: '2' },
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
    t.match(line, { bench: args[0], cpu: String, threads: 1, path: String, cpuFlags: Array });
    t.match(line, { rooflineGflops: Number, readGigabytesPerSecond: Number });
    t.ok((line.share as number) > 0, `share ${line.share}`);
  }
  return lines;
}

/**
 * What a share says follows from the other fields: so it is held to the bound, and not to how fast a machine is that does
 * other things meanwhile.
 */
function same(t: Test, got: unknown, want: number, what: string): void {
  t.ok(Math.abs((got as number) / want - 1) < 1e-3, `${what}: ${got}, expected ${want}`);
}

t.test('matmul: the share is of multiply-adds or of reading the weight, whichever takes longer', async (t) => {
  const lines = measurements(t, 'matmul', '--m', '1,900', '--shape', '512x1024', '--seconds', '0.01');
  const rows = [1, 1, 900, 900].map((m, i) => ({ m, n: 1024, k: 512, direction: i % 2 ? 'backward' : 'forward' }));
  t.match(lines, rows);
  for (const line of lines as Record<string, number>[]) {
    const { m, ms, rooflineGflops, readGigabytesPerSecond } = line as Record<'m' | 'ms' | keyof RooflineFields, number>;
    // Packed, an index a block of 64, a maximum for 256 of these.
    const bytes = 512 * 1024 * (1 / 2 + 1 / 64 + 4 / 64 / 256);
    const floor = Math.max((2 * m * 512 * 1024) / rooflineGflops, bytes / readGigabytesPerSecond) / 1e6;
    same(t, line.share, floor / ms, `share at M ${m}`);
  }
});

t.test('attention: causal, five products backward for two forward', async (t) => {
  const lines = measurements(t, 'attention', '--sequence', '64', '--head-size', '32', '--heads', '8', '--seconds', '0');
  const pairs = (64 * 65) / 2;
  for (const [i, direction] of ['forward', 'backward'].entries()) {
    const line = lines[i] as Record<'ms' | 'rooflineGflops', number>;
    t.match(line, { sequence: 64, headSize: 32, heads: 8, kvHeads: 8, direction });
    const flop = ([2, 5][i] as number) * 2 * pairs * 8 * 32;
    same(t, (line as Fields).share, flop / line.rooflineGflops / 1e6 / line.ms, direction);
  }
  t.equal(lines.length, 2);
});

t.test('train, generate, load', async (t) => {
  const on = ['--model', model];
  for (const checkpointing of ['off', 'on']) {
    const [line] = measurements(
      t, 'train', ...on, '--batch', '2', '--sequence', '128', '--checkpointing', checkpointing, '--steps', '1',
    ) as [Record<'tokensPerSecond' | 'rooflineGflops', number>]; // biome-ignore format: a command line
    t.match(line, {
      model: 'tiny',
      batch: 2,
      sequence: 128,
      checkpointing,
      peakRssBytes: Number,
      hostShare: Number,
      eventLoopDelayP99Ms: Number,
      minorFaultsPerStep: Number,
    });
    // The presets' tiny model: hidden 64, MLP 192, 2 layers, keys 32 wide, vocabulary 512; rank 16.
    const P = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192);
    const l = 2 * 16 * (2 * 128 + 2 * 96 + 3 * 256);
    const [dV, a] = [64 * 512, 2 * 128 * 64 * 2];
    const flop = checkpointing === 'on' ? 6 * P + 4 * dV + 4.5 * a + 8 * l : 4 * P + 4 * dV + 3.5 * a + 6 * l;
    same(t, (line as Fields).share, (line.tokensPerSecond * flop) / line.rooflineGflops / 1e9, 'share of the floor');
  }
  const [line] = measurements(t, 'generate', ...on, '--adapter', '--prefill', '64', '--new', '24', '--runs', '1') as [
    Record<'decodeTokensPerSecond' | 'bytesPerToken' | 'readGigabytesPerSecond', number>,
  ];
  t.match(line, { adapter: true, prefillTokensPerSecond: Number, prefillShare: Number });
  // Quantized layers and the head in bf16.
  const bytes = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192) * (1 / 2 + 1 / 64) + 2 * 64 * 512;
  t.ok(Math.abs(line.bytesPerToken / bytes - 1) < 0.01, `${line.bytesPerToken} bytes a token, expected ${bytes}`);
  const { decodeTokensPerSecond, bytesPerToken, readGigabytesPerSecond } = line;
  same(
    t,
    (line as Fields).share,
    (decodeTokensPerSecond * bytesPerToken) / readGigabytesPerSecond / 1e9,
    'of decoding',
  );
  t.match(measurements(t, 'load', '--preset', 'tiny'), [{ model: 'tiny', seconds: Number, peakRssBytes: Number }]);
  t.same(readdirSync(temporary), [], 'what they made is gone');
});

t.test('a table for people, and what is asked for wrongly', async (t) => {
  const { stdout, stderr } = run('load', '--model', model, '--runs', '1');
  t.equal(stderr, unread, 'a setting that there is not');
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
    t.match(stderr.slice(unread.length), message);
    t.notMatch(stderr, /\n +at /, 'no stack');
  }
});

t.test('a bound is the best rate that was met twice', async (t) => {
  t.equal(confirmedBest([]), undefined);
  t.equal(confirmedBest([470]), undefined);
  t.equal(confirmedBest([344, 470]), undefined, 'one of them was disturbed');
  t.equal(confirmedBest([344, 470, 466]), 470);
  t.equal(confirmedBest([36.2, 59.7, 36.5]), 36.5, 'one came from a cache');
});

t.test('--help', async (t) => {
  const all = run('--help').stdout.split('\n');
  for (const line of [
    /^ {2}roofline +multiply-adds/,
    /^ {2}make-model +a model/,
    /^ {2}--preset PRESET \(smollm-135m\)$/,
  ]) {
    t.ok(
      all.some((l) => line.test(l)),
      `${line}`,
    );
  }
  const one = run('matmul', '--help').stdout;
  t.match(one, /^matmul: 4-bit weights/);
  t.match(one, /^ {2}--m M \(1,4,16,64,256,1024,2048\)$/m);
  t.notMatch(one, /--preset/, 'nothing of others');
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
