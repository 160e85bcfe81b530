/** A run that is killed, that meets a full disk, or is stopped, goes on as if nothing had been. */
import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import t from 'tap';
import { randomBits } from '../../lib/data/order.js';
import { backends, type TrainEvent, type TrainResult } from '../../lib/index.js';
import { faultOf } from '../../lib/io/manifest.js';
import { cannotInject, injecting } from '../support/injector.js';

t.setTimeout(600_000); // a busy machine starts processes slowly

const childOf = (name: string) => fileURLToPath(new URL(`../support/${name}.js`, import.meta.url));

type Line = TrainEvent | ({ type: 'result' } & TrainResult) | { type: 'error'; code?: string; message: string };

/** Runs train-child.js, killing it where `kill` says so after an event. Its lines, as far as it came. */
async function life(
  folder: string,
  { kill, env = {} }: { kill?: (line: Line, events: number) => number | undefined; env?: NodeJS.ProcessEnv } = {},
): Promise<Line[]> {
  const { NODE_OPTIONS: _, ...clean } = process.env; // tap's hooks take longer to load than the run takes
  const args = [childOf('train-child'), join(folder, 'out'), join(folder, 'log')];
  const child = spawn(process.execPath, args, { env: { ...clean, ...env }, stdio: ['ignore', 'pipe', 'inherit'] });
  const lines: Line[] = [];
  for await (const text of createInterface({ input: child.stdout })) {
    const line = JSON.parse(text) as Line;
    lines.push(line);
    const after = kill?.(line, lines.length);
    if (after !== undefined) setTimeout(() => child.kill('SIGKILL'), after);
  }
  if (child.exitCode === null && child.signalCode === null) await new Promise((done) => child.once('exit', done));
  return lines;
}

const checkpointsIn = (out: string) => (existsSync(out) ? readdirSync(out) : []).filter((n) => /^checkpoint-/.test(n));
const temporaryIn = (out: string) => readdirSync(out).filter((name) => name.endsWith('tmp'));
const stepOf = (name: string) => Number(name.slice('checkpoint-'.length));

/** The lines of a log that must not depend on how often the run was killed. */
function logOf(folder: string): Map<string, Set<string>> {
  const log = new Map<string, Set<string>>();
  for (const text of readFileSync(join(folder, 'log'), 'utf8').trim().split('\n')) {
    const line = JSON.parse(text) as Line;
    if (line.type !== 'step' && line.type !== 'eval') continue;
    const { tokensPerSecond: _, memoryBytes: __, ...what } = line as TrainEvent & Record<string, unknown>;
    const key = `${line.type} ${line.step}`;
    log.set(key, (log.get(key) ?? new Set()).add(JSON.stringify(what)));
  }
  return log;
}

/** The run's own log: everything but times, speed and memory, and the warnings about what a kill left. */
function metricsOf(out: string): unknown[] {
  const lines = readFileSync(join(out, 'metrics.jsonl'), 'utf8').trim().split('\n');
  return lines
    .map((text) => JSON.parse(text))
    .filter(({ type }) => type !== 'start' && type !== 'warning')
    .map(({ time: _, tokensPerSecond: __, memoryBytes: ___, peakMemoryBytes: ____, ...line }) => line);
}

function hashesOf(out: string, names: readonly string[]): Record<string, string> {
  const hash = (name: string) =>
    createHash('sha256')
      .update(readFileSync(join(out, name)))
      .digest('hex');
  return Object.fromEntries(names.map((name) => [name, hash(name)]));
}

t.test('killed again and again, at any moment', async (t) => {
  const folder = t.testdir({ calm: {}, killed: {} });
  const [calm, killed] = [join(folder, 'calm'), join(folder, 'killed')];
  const undisturbed = await life(calm);
  t.match(undisturbed.at(-1), { type: 'result', steps: 40, stopped: false });
  const injector = cannotInject ? undefined : injecting('fail_io', folder);
  const out = join(killed, 'out');
  const saveSteps = 2;
  let kills = 0;
  let duringSaves = 0;
  let lastLogged = 0;
  let lines: Line[] = [];
  for (; kills < 22; kills++) {
    const random = (below: number, what: number) => randomBits(7, kills, what) % below;
    // In turn: some milliseconds after some event; at some system call of a save, of the removal after it, or at its end.
    const atCall = injector && kills % 3 !== 0;
    const events = 2 + random(6, 1);
    lines = await life(killed, {
      ...(atCall
        ? {
            env: {
              ...injector,
              FAIL_UNDER: join(out, kills % 3 === 1 ? '.checkpoint-' : ''),
              FAIL_AT: String(random(260, 2)),
              FAIL_WITH: 'kill',
            },
          }
        : { kill: (_, count) => (count === events ? random(12, 3) : undefined) }),
    });
    t.notMatch(lines, [{ type: 'error' }], JSON.stringify(lines.at(-1)));
    if (lines.at(-1)?.type === 'result') break;
    if (existsSync(out) && temporaryIn(out).length > 0) duringSaves++;
    const checkpoints = checkpointsIn(out);
    for (const name of checkpoints) t.equal(await faultOf(join(out, name)), undefined, `${name} is whole`);
    for (const line of lines) if (line.type === 'step') lastLogged = Math.max(lastLogged, line.step);
    const newest = Math.max(0, ...checkpoints.map(stepOf));
    t.ok(newest >= lastLogged - saveSteps, `at most one save interval is lost: ${newest} of ${lastLogged}`);
  }
  lines = await life(killed);
  t.match(lines.at(-1), { type: 'result', steps: 40, stopped: false });
  t.ok(kills >= 20, `${kills} kills`);
  if (injector) t.ok(duringSaves >= 5, `${duringSaves} of them in the middle of a save`);
  t.comment(`killed ${kills} times, ${duringSaves} of them during a save`);
  t.same(temporaryIn(out), [], 'nothing half-written is left');
  t.same(logOf(killed), logOf(calm), 'every loss, and every evaluation, is the same');
  t.same(metricsOf(out), metricsOf(join(calm, 'out')), 'and so does metrics.jsonl say');
  // The report has times in it.
  const names = readdirSync(join(calm, 'out')).filter((name) => !/^(metrics\.jsonl|report\.html)$/.test(name));
  for (const name of names) t.ok(readdirSync(out).includes(name), name);
  t.equal(checkpointsIn(out).length, 3, 'the two newest, and the best');
  const files = names.flatMap((name) =>
    name.startsWith('checkpoint-') ? readdirSync(join(out, name)).map((file) => join(name, file)) : [name],
  );
  t.ok(files.includes('adapter_model.safetensors') && files.includes('checkpoint-40/optimizer.safetensors'));
  t.same(hashesOf(out, files), hashesOf(join(calm, 'out'), files), 'adapter, optimizer and all else: bit for bit');
});

t.test('what a power cut may undo is synced in order', { skip: cannotInject }, async (t) => {
  const folder = t.testdir({});
  const log = join(folder, 'calls');
  const out = join(folder, 'out');
  const env = { ...injecting('fail_io', folder), FAIL_UNDER: out, FAIL_LOG: log };
  await life(folder, { env, kill: ({ type }) => (type === 'checkpoint' ? 0 : undefined) });
  const calls = readFileSync(log, 'utf8').trim().split('\n');
  const moved = calls.findIndex((call) => /^rename \S+\.tmp \S+checkpoint-2$/.test(call));
  t.ok(moved > 0, 'the folder is renamed');
  const temporary = (calls[moved] as string).split(' ')[1] as string;
  const files = calls
    .slice(0, moved)
    .map((call, at) => ({ at, match: /^rename (\S+) (\S+)$/.exec(call) }))
    .filter(({ match }) => match && dirname(match[2] as string) === temporary);
  t.equal(basename(files.at(-1)?.match?.[2] as string), 'manifest.json', 'the manifest comes last');
  t.ok(files.length >= 5);
  for (const { at, match } of files) {
    const [, from, to] = match as unknown as [string, string, string];
    const written = calls.lastIndexOf(`write ${from}`, at);
    const synced = calls.lastIndexOf(`fsync ${from}`, at);
    t.ok(written >= 0 && written < synced && synced < at, `${basename(to)}: written, synced, renamed`);
  }
  const lastFile = files.at(-1)?.at as number;
  t.ok(calls.slice(lastFile, moved).includes(`fsync ${temporary}`), 'the folder is synced before it is renamed');
  t.ok(calls.slice(moved).includes(`fsync ${out}`), 'and the one above it afterwards');
});

t.test('on a processor with other instructions it goes on, and says so', async (t) => {
  const folder = t.testdir({});
  const stop = ({ type }: Line) => (type === 'checkpoint' ? 0 : undefined);
  await life(folder, { env: { QLORA_CPU: 'scalar' }, kill: stop });
  const [first] = await life(folder, { kill: stop });
  const [feature] = backends().available[0]?.features.filter((name) => name.startsWith('path:')) ?? [];
  const warns = first?.type === 'warning' && first.code === 'INSTRUCTION_SET';
  t.equal(warns, feature !== 'path:scalar', JSON.stringify(first));
});
