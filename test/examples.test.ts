/** The programs of examples/ run, from the package's folder as their comments say, and do what they say. */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import t from 'tap';
import { packageRoot } from './support/references.js';

t.setTimeout(600_000); // a busy machine trains slowly
const output = mkdtempSync(join(tmpdir(), 'qlora-examples-'));
t.teardown(() => rmSync(output, { recursive: true }));

function run(name: string, ...args: string[]): string[] {
  const program = fileURLToPath(new URL(`../examples/${name}.js`, import.meta.url));
  const env = { ...process.env, NODE_OPTIONS: '' };
  return execFileSync(process.execPath, [program, ...args], { cwd: packageRoot(), encoding: 'utf8', env })
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
