/** The programs of examples/ run, from the package's folder as their comments say, and do what they say. */
import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { Readable } from 'node:stream';
import type { ReadableStream } from 'node:stream/web';
import { fileURLToPath } from 'node:url';
import t from 'tap';
import { packageRoot } from './support/references.js';

t.setTimeout(3_600_000); // a busy machine trains slowly, and a sanitizer's build ten times so; the runner sets the limit
const output = mkdtempSync(join(tmpdir(), 'qlora-examples-'));
t.teardown(() => rmSync(output, { recursive: true }));

const program = (name: string) => fileURLToPath(new URL(`../examples/${name}.js`, import.meta.url));
const inPackage = { cwd: packageRoot(), env: { ...process.env, NODE_OPTIONS: '' } };

function run(name: string, ...args: string[]): string[] {
  return execFileSync(process.execPath, [program(name), ...args], { ...inPackage, encoding: 'utf8' })
    .trim()
    .split('\n');
}

t.test('train-on-rows', async (t) => {
  const directory = join(output, 'train-on-rows');
  const lines = run('train-on-rows', directory);
  t.equal(lines.filter((line) => line.startsWith('step ')).length, 6);
  const loss = (line: string | undefined) => Number(/loss ([\d.]+)/.exec(line ?? '')?.[1]);
  t.ok(loss(lines[5]) < 0.1 * loss(lines[0]), `from ${lines[0]} to ${lines[5]}`);
  t.match(lines[6] as string, /^held-out rows: loss 0\.\d+$/);
  t.equal(lines[7], `221184 trained numbers are in ${directory}`);
  const right = [7, 21, 38, 46].filter((n) =>
    lines.some((l) => l.startsWith(`Double ${n}:`) && l.endsWith(`the adapter ${2 * n}`)),
  );
  t.ok(right.length >= 3, `${right.length} of 4 held-out numbers are doubled`);
  t.same(readdirSync(directory).sort(), [
    'adapter_config.json',
    'adapter_model.safetensors',
    'checkpoint-30',
    'metrics.jsonl',
    'qlora_node.json',
    'report.html',
  ]);
});

t.test('stream-answers', async (t) => {
  const lines = run('stream-answers');
  t.match(lines[0] as string, /^loaded on cpu, 1\.\d MB$/);
  t.same(lines.slice(1, 3), ['12 + 30 = 42', 'apple, three times: apple apple apple']);
  t.match(lines[3] as string, /^sampled: \S/);
  t.same(lines.slice(4), ['hot, turned around: cold', 'digits of 407: 4 0 7']);
});

t.test('read-lora-weights', async (t) => {
  const lines = run('read-lora-weights', join(output, 'read-lora-weights'));
  const changes = lines.map((line) => Number(/changed by ([\d.]+)$/.exec(line)?.[1]));
  t.equal(lines.length, 9, 'q and v of four layers, and the first again');
  t.ok(
    changes.slice(0, 8).every((c) => c > 0.01),
    'every layer moved',
  );
  t.equal(changes[8], 0, 'but for the one whose B was set to zero');
  t.match(lines[0] as string, /^model\.layers\.0\.self_attn\.q_proj \(192 x 192, r 4\)/);
});

t.test('train-on-csv', async (t) => {
  const directory = join(output, 'train-on-csv');
  const lines = run('train-on-csv', 'examples/data/numbers.csv', directory);
  t.match(lines.join('\n'), /### Response: \[1\]\[2\]\[<\/s>\]\nafter 30 steps the loss is 0\.\d+\n/);
  t.notMatch(lines.at(-3) as string, /: 12$/, 'a word that the base cannot read');
  t.equal(lines.at(-2), 'with the adapter: 12');
  t.ok(readdirSync(directory).includes('report.html'));
});

t.test('train-on-chats', async (t) => {
  const lines = run('train-on-chats', join(output, 'train-on-chats'));
  t.match(lines[3] as string, /^step 40: loss 0\.[0-4]/);
  t.same(lines.slice(4), ['I am Grace. -> Hello Grace!', 'Spell my name backwards. -> ecarg']);
});

t.test('stop-and-resume', async (t) => {
  const lines = run('stop-and-resume', join(output, 'stop-and-resume'));
  t.equal(lines[0], 'saved checkpoint-5');
  const [, stopped] = /^stopped after (\d+) steps$/.exec(lines.at(-2) as string) ?? [];
  t.equal(lines[1], `saved checkpoint-${stopped}`);
  t.match(lines.at(-1) as string, `went on with step ${Number(stopped) + 1}, ended after 18 with loss `);
});

t.test('several-adapters', async (t) => {
  const lines = run('several-adapters', join(output, 'several-adapters'));
  t.match(lines[1] as string, /^next: loss 0\.0\d+, 2 loaded$/);
  t.match(
    lines[2] as string,
    /^What comes of 21\? double: 42, next: 22, the base guesses \d+, as before any training$/,
  );
  t.match(lines[3] as string, /^What comes of 8\? double: 16, next: 9, the base guesses \d+, as before any training$/);
});

t.test('train-in-a-server', async (t) => {
  const directory = join(output, 'train-in-a-server');
  const server = spawn(process.execPath, [program('train-in-a-server'), '0', directory], inPackage);
  t.teardown(() => server.kill('SIGKILL'));
  const lines = createInterface({ input: server.stdout })[Symbol.asyncIterator]();
  const address = /^listening on (http:\S+)$/.exec((await lines.next()).value)?.[1] as string;
  const ask = async (n: number) => (await (await fetch(`${address}/ask?Double+${n}.`)).text()).trim();

  const before = await ask(21);
  t.equal((await fetch(`${address}/train`, { method: 'POST' })).status, 202);
  const progress = await fetch(`${address}/progress`);
  t.equal(progress.headers.get('content-type'), 'text/event-stream');
  const events: { type: string; step?: number; steps?: number }[] = [];
  let answered: string | undefined;
  const stream = Readable.fromWeb(progress.body as ReadableStream);
  for await (const line of createInterface({ input: stream })) {
    if (line === '') continue;
    t.match(line, /^data: \{/);
    events.push(JSON.parse(line.slice('data: '.length)));
    if (events.length === 3) answered = await ask(21);
    if (events.at(-1)?.type === 'done') break;
  }
  stream.destroy();
  t.same(
    events.filter(({ type }) => type === 'step').map(({ step }) => step),
    Array.from({ length: 30 }, (_, i) => i + 1),
  );
  t.ok(answered, 'it answers while it trains');
  t.not(before, '42');
  t.equal(await ask(21), '42', 'and has learnt');
  t.equal((await fetch(`${address}/nothing`)).status, 404);
  server.kill('SIGTERM');
  t.equal((await lines.next()).value, `after 30 steps, kept in ${directory}`);
  await once(server, 'exit');
});
