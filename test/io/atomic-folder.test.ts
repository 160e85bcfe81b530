/** Folders, and files that belong together, are seen old or new, never mixed. */
import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { constants } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import t from 'tap';
import { writeFileAtomic } from '../../lib/io/atomic-file.js';
import { removeLeftovers, replaceFiles, writeFolder } from '../../lib/io/atomic-folder.js';
import { makeFolder } from '../../lib/io/folder.js';
import { cannotInject, injecting } from '../support/injector.js';
import { look, prepare, type Replaced } from '../support/replace-child.js';

const child = fileURLToPath(new URL('../support/replace-child.js', import.meta.url));
t.setTimeout(600_000); // a busy machine starts processes slowly

t.test('a folder appears whole, replaces an earlier one, and not at all where it fails', async (t) => {
  const above = t.testdir({});
  const path = join(above, 'a');
  await writeFolder(path, (folder) => writeFileAtomic(join(folder, 'x'), 'first'));
  await writeFolder(path, (folder) => writeFileAtomic(join(folder, 'y'), 'second'));
  t.same(readdirSync(path), ['y'], 'nothing of the earlier one is left');
  const fails = writeFolder(path, async (folder) => {
    await writeFileAtomic(join(folder, 'z'), 'third');
    throw new Error('no');
  });
  await t.rejects(fails, { message: 'no' });
  t.equal(readFileSync(join(path, 'y'), 'utf8'), 'second');
  t.same(readdirSync(above), ['a']);
  await t.rejects(
    writeFolder(join(above, 'no', 'a'), async () => {}),
    { code: 'ERR_QLORA_WRITE_FAILED', hint: String },
  );
  writeFileSync(join(above, '.b.0123456789abcdef.qlora-tmp'), '');
  writeFileSync(join(above, '.hidden.tmp'), '');
  await removeLeftovers(above);
  t.same(readdirSync(above).sort(), ['.hidden.tmp', 'a']);
});

t.test('folders are made where they are missing', async (t) => {
  const folder = t.testdir({ file: '' });
  const deep = join(folder, 'a', 'b', 'c');
  await Promise.all(Array.from({ length: 8 }, () => makeFolder(deep)));
  await makeFolder(deep);
  t.same(readdirSync(join(folder, 'a', 'b')), ['c']);
  const wrong = { code: 'ERR_QLORA_WRITE_FAILED', message: /cannot make this folder/, hint: String };
  await t.rejects(makeFolder(join(folder, 'file')), wrong);
  await t.rejects(makeFolder(join(folder, 'file', 'b')), wrong);
  // Of a system that lets nobody make files there.
  if (existsSync('/proc/self')) await t.rejects(makeFolder('/proc/nope/deeper'), wrong);
});

t.test('files of an earlier save that are not made again go, where they are named', async (t) => {
  const folder = t.testdir({ 'config.json': 'old', 'record.json': 'old', 'mine.txt': 'mine' });
  await replaceFiles(folder, 'config.json', ['record.json'], (temporary) =>
    writeFileAtomic(join(temporary, 'config.json'), 'new'),
  );
  t.same(readdirSync(folder).sort(), ['config.json', 'mine.txt']);
});

t.test('replacing fails, or is killed, at any system call', { skip: cannotInject }, async (t) => {
  const above = t.testdir({});
  const injector = injecting('fail_io', above);
  const folder = join(above, 'model');
  const { NODE_OPTIONS: _, ...clean } = process.env;
  const run = (args: string[], env: NodeJS.ProcessEnv) =>
    spawnSync(process.execPath, [child, folder, ...args], {
      encoding: 'utf8',
      env: { ...clean, ...injector, FAIL_UNDER: folder, ...env },
    });
  const old = { 'config.json': 'old', 'record.json': 'old', 'weights.safetensors': 'old' };
  const fresh = { 'config.json': 'new', 'record.json': 'new', 'weights.safetensors': 'new' };
  const same = (a: object, b: object) => JSON.stringify(a) === JSON.stringify(b);
  const calls = 50;
  const failed = run([String(calls)], { FAIL_WITH: String(constants.errno.ENOSPC) });
  t.equal(failed.status, 0, failed.stderr);
  const outcomes = JSON.parse(failed.stdout) as Replaced[];
  const seen = { old: 0, unmarked: 0, fresh: 0 };
  for (const [call, { code, content, temporary }] of outcomes.entries()) {
    const unmarked = !('config.json' in content);
    t.ok(unmarked || same(content, old) || same(content, fresh), `call ${call}: ${JSON.stringify(content)}`);
    if (same(content, fresh)) seen.fresh++;
    else t.match(code, /^ERR_QLORA_(DISK_FULL|WRITE_FAILED)$/, `call ${call}`);
    if (same(content, old)) t.same(temporary, [], `call ${call}: no leftover`);
    if (same(content, old)) seen.old++;
    if (unmarked) seen.unmarked++;
  }
  t.ok(seen.old > 20 && seen.fresh > 3 && seen.unmarked < 6, JSON.stringify(seen));
  // The renames lie behind what was written: each of them is met.
  for (let call = 0; call < calls; call += call < 21 ? 7 : 3) {
    prepare(folder);
    run([], { FAIL_WITH: 'kill', FAIL_AT: String(call) });
    const { content } = look(folder);
    const whole = !('config.json' in content) || same(content, old) || same(content, fresh);
    t.ok(whole, `killed at call ${call}: ${JSON.stringify(content)}`);
  }
});
