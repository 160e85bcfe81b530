/** Makes what a child process asks of the system fail, by a library that is preloaded into it. */
import { execFileSync, spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { packageRoot } from './references.js';

const compiler = ['c++', 'g++', 'clang++'].find((name) => spawnSync(name, ['--version']).status === 0);

/** Why it cannot be done here; false where it can. */
export const cannotInject =
  process.platform !== 'linux' ? 'needs LD_PRELOAD' : compiler ? false : 'needs a C++ compiler';

/** Compiles test/support/<name>.cpp into `folder`; the variable with which it is preloaded, after what is so already: a sanitizer comes first. */
export function injecting(name: 'fail_io' | 'fail_threads', folder: string): { LD_PRELOAD: string } {
  const library = join(folder, `${name}.so`);
  const source = join(packageRoot(), 'test', 'support', `${name}.cpp`);
  execFileSync(compiler as string, ['-shared', '-fPIC', '-O1', '-o', library, source, '-ldl']);
  const { LD_PRELOAD } = process.env;
  return { LD_PRELOAD: LD_PRELOAD ? `${LD_PRELOAD}:${library}` : library };
}
