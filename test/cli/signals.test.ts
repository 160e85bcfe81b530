/** Runs that are stopped from outside, and go on. */
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import t from 'tap';
import { cli } from '../support/cli.js';
import { packageRoot } from '../support/references.js';

t.setTimeout(600_000); // a busy machine trains slowly
const folder = mkdtempSync(join(tmpdir(), 'qlora-signals-'));
t.teardown(() => rmSync(folder, { recursive: true }));
const model = join(packageRoot(), 'examples', 'demo', 'model');
const data = join(folder, 'double.jsonl');
const rows = Array.from({ length: 200 }, (_, n) => ({ instruction: `Double ${n}.`, output: `${2 * n}` }));
writeFileSync(data, rows.map((row) => JSON.stringify(row)).join('\n'));

const train = (name: string, steps: number, batch: number, ...more: string[]) => [
  ...['train', '--model', model, '--dataset', data, '--output-dir', join(folder, name), '--lora-r', '4', '--json'],
  ...['--max-steps', `${steps}`, '--batch-size', `${batch}`, '--gradient-accumulation-steps', '2', ...more],
];
const bytesOf = (name: string) => readFileSync(join(folder, name, 'adapter_model.safetensors'));
const stepsOf = (objects: Record<string, unknown>[]) => objects.filter(({ type }) => type === 'step');

/** Sends a signal once, when the text of the output has a match. */
const when = (pattern: RegExp, ...signals: NodeJS.Signals[]) => {
  let sent = 0;
  return (stdout: string, child: { kill(signal: NodeJS.Signals): boolean }) => {
    const found = [...stdout.matchAll(pattern)].length;
    while (sent < Math.min(found, signals.length)) child.kill(signals[sent++] as NodeJS.Signals);
  };
};

t.test('SIGTERM stops with a checkpoint, and resume goes on as if nothing had been', async (t) => {
  const steps = 12;
  const undisturbed = await cli(train('whole', steps, 1));
  t.equal(undisturbed.status, 0, undisturbed.stderr);

  const stopped = await cli(train('stopped', steps, 1), { onOutput: when(/"type":"step","step":2,/g, 'SIGTERM') });
  t.equal(stopped.status, 75, stopped.stderr);
  const result = stopped.objects.at(-1) as { steps: number; stopped: boolean; outputDir: string };
  t.match(result, { type: 'result', stopped: true });
  t.ok(result.steps < steps, `after ${result.steps} steps`);
  t.equal(result.outputDir, join(folder, 'stopped', `checkpoint-${result.steps}`));
  t.ok(existsSync(join(result.outputDir, 'optimizer.safetensors')));
  t.notOk(existsSync(join(folder, 'stopped', 'adapter_model.safetensors')), 'the place of finished runs is empty');
  t.ok(stopped.objects.some(({ type, message }) => type === 'log' && /^SIGTERM: /.test(String(message))));

  t.match(await cli(train('stopped', steps, 1)), { status: 2, stderr: /ERR_QLORA_OUTPUT_EXISTS/ });
  const resumed = await cli(['resume', join(folder, 'stopped'), '--json']);
  t.equal(resumed.status, 0, resumed.stderr);
  t.match(resumed.objects.at(-1), { type: 'result', steps, stopped: false });
  const losses = (objects: Record<string, unknown>[]) => stepsOf(objects).map(({ step, loss }) => [step, loss]);
  t.same([...losses(stopped.objects), ...losses(resumed.objects)], losses(undisturbed.objects));
  t.ok(bytesOf('stopped').equals(bytesOf('whole')), 'the same bits');

  const again = await cli(['resume', join(folder, 'stopped'), '--json']);
  t.equal(again.status, 0, again.stderr);
  t.same(stepsOf(again.objects), [], 'a finished run is not trained again');
  t.same(again.objects.at(-1), resumed.objects.at(-1));
  t.ok(again.objects.some(({ message }) => /the run is finished \(12 of 12 steps\)/.test(String(message))));

  t.match(await cli(['resume', folder]), { status: 1, stderr: /ERR_QLORA_RUN_NOT_FOUND/ });
});

t.test('Ctrl-C once keeps what was done, twice ends at once', async (t) => {
  const once = await cli(train('once', 500, 1), { onOutput: when(/"type":"step"/g, 'SIGINT') });
  t.equal(once.status, 75, once.stderr);
  t.match(readdirSync(join(folder, 'once')).join(), /checkpoint-\d+/);

  // A step takes seconds: the second signal comes long before the first has stopped it.
  const twice = await cli(train('twice', 500, 200), {
    onOutput: when(/"type":"step"|SIGINT: stopping/g, 'SIGINT', 'SIGINT'),
  });
  t.equal(twice.status, 130, twice.stdout);
  t.notMatch(twice.stdout, '"type":"result"');

  const early = await cli(train('early', 500, 1), { onOutput: when(/"type":"log"/g, 'SIGINT') });
  t.ok([130, 75].includes(early.status as number), 'before the first step there may be nothing to keep');
});

t.test("SIGUSR1 stops where asked for, and never opens Node's inspector", async (t) => {
  const run = await cli(train('usr1', 500, 1, '--stop-on-usr1'), { onOutput: when(/"type":"step"/g, 'SIGUSR1') });
  t.equal(run.status, 75, run.stderr);
  t.equal(run.stderr, '', 'no debugger listens');
  const loading = await cli(train('usr1-early', 2, 1, '--stop-on-usr1'), {
    onOutput: when(/"type":"log"/g, 'SIGUSR1'),
  });
  t.notMatch(loading.stderr, /Debugger/);
});
