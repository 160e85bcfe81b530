/** Nothing is lost, whatever fails while a file is written. */
import { spawnSync } from 'node:child_process';
import { readdirSync, readFileSync, symlinkSync, utimesSync } from 'node:fs';
import { constants } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import t from 'tap';
import { removeTemporaryFiles, writeFileAtomic } from '../../lib/io/atomic-file.js';
import { writeSafetensors } from '../../lib/io/safetensors.js';
import { Stream, Tensor } from '../../lib/tensor.js';
import { cannotInject, injecting } from '../support/injector.js';
import type { SaveOutcome } from '../support/save-child.js';

const child = fileURLToPath(new URL('../support/save-child.js', import.meta.url));

t.test('a text replaces the one before', async (t) => {
  const folder = t.testdir({ 'a.json': 'old' });
  await writeFileAtomic(join(folder, 'a.json'), '{"ü": 1}');
  t.equal(readFileSync(join(folder, 'a.json'), 'utf8'), '{"ü": 1}');
  t.same(readdirSync(folder), ['a.json']);
  await writeFileAtomic(join(folder, 'empty'), '');
  t.equal(readFileSync(join(folder, 'empty'), 'utf8'), '');
});

t.test('a folder that is not there, and a path that is a folder', async (t) => {
  const folder = t.testdir({ sub: {} });
  await t.rejects(writeFileAtomic(join(folder, 'no', 'a'), 'x'), {
    code: 'ERR_QLORA_WRITE_FAILED',
    message: /no\/a: cannot create.*No such file/,
  });
  await t.rejects(writeFileAtomic(join(folder, 'sub'), 'x'), { code: 'ERR_QLORA_WRITE_FAILED', message: /rename/ });
  await t.rejects(writeFileAtomic(`${join(folder, 'a')}\0b`, 'x'), { code: 'ERR_QLORA_WRITE_FAILED' });
  t.same(readdirSync(folder), ['sub']);
});

t.test('a link at the path is replaced, not followed', async (t) => {
  const folder = t.testdir({ target: 'old' });
  symlinkSync('target', join(folder, 'link'));
  await writeFileAtomic(join(folder, 'link'), 'new');
  t.equal(readFileSync(join(folder, 'target'), 'utf8'), 'old');
  t.equal(readFileSync(join(folder, 'link'), 'utf8'), 'new');
});

t.test('leftovers of a killed process are removed, other files stay', async (t) => {
  const folder = t.testdir({ '.a.json.0123456789abcdef.qlora-tmp': 'half', 'a.json': 'whole', '.hidden': '' });
  const half = '.a.json.0123456789abcdef.qlora-tmp';
  await removeTemporaryFiles(folder);
  t.same(readdirSync(folder).sort(), [half, '.hidden', 'a.json'].sort(), 'not one that may be a save under way');
  const yesterday = Date.now() / 1000 - 86_400;
  utimesSync(join(folder, half), yesterday, yesterday);
  await removeTemporaryFiles(folder);
  t.same(readdirSync(folder).sort(), ['.hidden', 'a.json']);
});

t.test('a tensor that failed is not written', async (t) => {
  const folder = t.testdir({ 'a.safetensors': 'old' });
  const stream = new Stream();
  const poisoned = new Tensor(stream, 'f32', [4]);
  const path = join(folder, 'a.safetensors');
  await t.rejects(writeSafetensors(path, [{ name: 'a', data: poisoned }]), { code: 'ERR_QLORA_INTERNAL' });
  t.equal(readFileSync(path, 'utf8'), 'old');
  t.same(readdirSync(folder), ['a.safetensors']);
  await stream.close();
  await t.rejects(writeSafetensors(path, [{ name: 'a', data: poisoned }]), { code: 'ERR_QLORA_DISPOSED' });
});

t.test('a file size limit', async (t) => {
  const folder = t.testdir({});
  // tap's hook in child processes catches SIGXFSZ, the signal of this limit, and ends the process with it.
  const run = spawnSync(
    'sh',
    [
      '-c',
      `unset NODE_OPTIONS; ulimit -f 16; exec "${process.execPath}" -e '
    import("${new URL('../../lib/io/atomic-file.js', import.meta.url)}").then(async ({ writeFileAtomic }) => {
      await writeFileAtomic("a", "old");
      await writeFileAtomic("a", new Uint8Array(100000)).catch((e) => console.log(e.code, e.message));
    })'`,
    ],
    { cwd: folder, encoding: 'utf8' },
  );
  t.equal(run.status, 0, `signal ${run.signal}: ${run.stderr}`);
  t.match(
    run.stdout,
    /^ERR_QLORA_WRITE_FAILED .*a: cannot write it: File too large \(the file takes 100000 bytes\)/,
    run.stderr,
  );
  t.equal(readFileSync(join(folder, 'a'), 'utf8'), 'old');
  t.same(readdirSync(folder), ['a']);
});

t.test('every system call of a save fails once', { skip: cannotInject }, async (t) => {
  const above = t.testdir({ work: {} });
  const folder = join(above, 'work');
  const injected = { ...process.env, ...injecting('fail_io', above), FAIL_UNDER: folder };
  // create, write x 3 (header, a, b), fsync, close, rename, open folder, fsync folder, close folder
  const calls = 10;
  const lastBeforeRename = 6;
  const run = (onto: string, failWith: string, count = calls): SaveOutcome[] => {
    const result = spawnSync(process.execPath, [child, join(folder, 'a.safetensors'), onto, String(count)], {
      encoding: 'utf8',
      env: { ...injected, FAIL_WITH: failWith },
    });
    if (result.status !== 0) throw new Error(result.stderr);
    return JSON.parse(result.stdout) as SaveOutcome[];
  };
  for (const [name, code] of [
    ['ENOSPC', 'ERR_QLORA_DISK_FULL'],
    ['EIO', 'ERR_QLORA_WRITE_FAILED'],
    ['EDQUOT', 'ERR_QLORA_DISK_FULL'],
  ] as const) {
    for (const onto of ['stream', 'background']) {
      const outcomes = run(onto, String(constants.errno[name]), calls + 1);
      for (const { call, ...outcome } of outcomes) {
        const what = `${name} at call ${call}, ${onto}`;
        t.same(outcome.files, ['a.safetensors'], `${what}: no temporary file`);
        if (call <= lastBeforeRename) {
          t.equal(outcome.code, code, `${what}: ${outcome.message}`);
          t.equal(outcome.content, 'old', `${what}: the earlier file is as it was`);
          t.match(outcome.message, /a\.safetensors: cannot .*20\d\d\d bytes/, what);
          t.match(outcome.hint, /untouched/, what);
        } else {
          t.equal(outcome.content, 'new', `${what}: the new file is whole`);
          // Only a folder that cannot be synced still matters.
          t.equal(outcome.code, call <= 8 ? code : undefined, what);
        }
      }
    }
  }
  for (const { content, code, call } of [...run('stream', 'short'), ...run('stream', String(constants.errno.EINTR))]) {
    t.equal(content, 'new', `short or interrupted call ${call} is gone on with`);
    t.equal(code, undefined);
  }
});
