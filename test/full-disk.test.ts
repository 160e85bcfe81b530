/** A disk that fills up while an adapter or a model is saved: an error, and what was there before is whole. */
import { execFileSync, spawnSync } from 'node:child_process';
import { readdirSync } from 'node:fs';
import { constants } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import t from 'tap';
import { packageRoot } from './support/references.js';

const demo = join(packageRoot(), 'examples', 'demo', 'model');
const compiler = ['c++', 'g++', 'clang++'].find((name) => spawnSync(name, ['--version']).status === 0);
const cannotInject = process.platform !== 'linux' ? 'needs LD_PRELOAD' : compiler ? false : 'needs a C++ compiler';

t.test('a full disk while an adapter or a model is saved', { skip: cannotInject }, async (t) => {
  const folder = t.testdir({ out: {} });
  const library = join(folder, 'fail_io.so');
  const source = join(packageRoot(), 'test', 'support', 'fail_io.cpp');
  execFileSync(compiler as string, ['-shared', '-fPIC', '-O1', '-o', library, source, '-ldl']);
  const child = fileURLToPath(new URL('./support/save-model-child.js', import.meta.url));
  for (const what of ['adapter', 'model']) {
    const result = spawnSync(process.execPath, [child, what, demo, join(folder, 'out', what)], {
      encoding: 'utf8',
      env: { ...process.env, LD_PRELOAD: library, FAIL_WITH: String(constants.errno.ENOSPC) },
    });
    t.equal(result.status, 0, result.stderr);
    const outcomes = JSON.parse(result.stdout) as {
      code: string;
      hint: string;
      name: string;
      whole: boolean;
      same: boolean;
      files: string[];
    }[];
    t.ok(outcomes.length >= 4, `${what}: ${outcomes.length} places to fail`);
    for (const outcome of outcomes) {
      t.match(outcome, { name: 'QLoRAError', code: 'ERR_QLORA_DISK_FULL', hint: /Free space/ });
      t.ok(outcome.whole, 'every file that was there is whole');
      t.ok(outcome.same, 'the model computes what it did');
      t.notOk(
        outcome.files.some((name) => name.includes('tmp')),
        'no temporary file',
      );
    }
    t.notOk(readdirSync(join(folder, 'out', what)).some((name) => name.includes('tmp')));
  }
});
