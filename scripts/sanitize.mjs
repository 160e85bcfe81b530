// Builds with a sanitizer and runs what it can see:
//   node scripts/sanitize.mjs native         engine_test under ThreadSanitizer, then under Address-, UB- and LeakSanitizer
//   node scripts/sanitize.mjs suite [files]  the tests with the addon under AddressSanitizer and UBSan
//   node scripts/sanitize.mjs fuzz SECONDS   all libFuzzer harnesses at once for so long, under AddressSanitizer and UBSan
// What it builds stays in build/<name>, so that a second run is quick.
import { execFile, execFileSync, spawnSync } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { fuzzSeeds } from './fuzz-seeds.mjs';

const root = fileURLToPath(new URL('..', import.meta.url));
const memoryAndArithmetic = 'address,undefined';

/** @param {string} name @param {string} sanitizers @param {string[]} options */
function build(name, sanitizers, options, env = {}) {
  const folder = `${root}/build/${name}/build`;
  const run = (...args) =>
    execFileSync('cmake', args, { cwd: root, stdio: 'inherit', env: { ...process.env, ...env } });
  run(
    '-S',
    '.',
    '-B',
    folder,
    '-DCMAKE_BUILD_TYPE=RelWithDebInfo',
    '-DQLORA_CUDA=OFF',
    `-DQLORA_SANITIZE=${sanitizers}`,
    ...options,
  );
  run('--build', folder, '--parallel', '2');
  return folder;
}

function check(command, args, env = {}) {
  const { status, signal } = spawnSync(command, args, { cwd: root, stdio: 'inherit', env: { ...process.env, ...env } });
  if (status !== 0) throw new Error(`${command}: ${signal ?? `exit code ${status}`}`);
}

/** Distributions have it under its name or with its version behind. */
function clang() {
  const names = ['clang++', ...Array.from({ length: 12 }, (_, i) => `clang++-${25 - i}`)];
  const found = names.find((name) => spawnSync(name, ['--version']).status === 0);
  if (!found) throw new Error(`libFuzzer needs clang, of which none is here: ${names.join(', ')}`);
  return found;
}

const UBSAN_OPTIONS = 'print_stacktrace=1:halt_on_error=1';

/** Shows what it says when it has ended. Rejects where it found something. */
async function fuzz(folder, fuzzer, seeds, seconds) {
  const corpus = `${folder}/${fuzzer}.corpus`;
  mkdirSync(corpus, { recursive: true });
  for (const [name, bytes] of Object.entries(seeds)) writeFileSync(`${corpus}/${name}`, bytes);
  const args = [corpus, `-max_total_time=${seconds}`, '-max_len=4096', '-timeout=10', '-print_final_stats=1'];
  const env = { ...process.env, UBSAN_OPTIONS, QLORA_NUM_THREADS: '2' };
  const options = { cwd: root, env, maxBuffer: Number.POSITIVE_INFINITY };
  const run = promisify(execFile)(`${folder}/${fuzzer}`, args, options);
  const ended = await run.catch((error) => error);
  process.stderr.write(ended.stderr);
  if (ended instanceof Error) throw new Error(`${fuzzer}: ${ended.signal ?? `exit code ${ended.code}`}`);
}

const tasks = {
  native() {
    for (const [name, sanitizers] of [
      ['thread', 'thread'],
      ['address-native', memoryAndArithmetic],
    ]) {
      const folder = build(name, sanitizers, ['-DQLORA_NATIVE_TESTS=ON']);
      check(`${folder}/engine_test`, [], { UBSAN_OPTIONS, TSAN_OPTIONS: 'halt_on_error=1' });
    }
  },
  suite(...files) {
    build('address', memoryAndArithmetic, []);
    const compiler = process.env.CXX ?? 'c++';
    const library = execFileSync(compiler, ['-print-file-name=libasan.so'], { encoding: 'utf8' }).trim();
    // One instrumented file takes up to ten minutes where others use the machine.
    check(process.execPath, ['scripts/test.mjs', '--timeout=3600', ...files], {
      LD_PRELOAD: library,
      // Node's own allocations live until the process ends; leaks are looked for where Node is not.
      ASAN_OPTIONS: 'detect_leaks=0:halt_on_error=1:allocator_may_return_null=1',
      UBSAN_OPTIONS,
      QLORA_NODE_PREBUILD: `${root}/build/address`,
    });
  },
  async fuzz(seconds = '60') {
    // One set of kernels: a fuzzer would take the better of two.
    const isa = process.arch === 'x64' ? 'avx2' : 'scalar';
    const options = ['-DQLORA_FUZZERS=ON', `-DQLORA_ISAS=${isa}`];
    const folder = build('fuzz', memoryAndArithmetic, options, { CXX: clang() });
    const runs = Object.entries(fuzzSeeds()).map(([fuzzer, seeds]) => fuzz(folder, fuzzer, seeds, seconds));
    for (const { status, reason } of await Promise.allSettled(runs)) if (status === 'rejected') throw reason;
  },
};

const [task, ...args] = process.argv.slice(2);
if (!Object.hasOwn(tasks, task ?? '')) throw new Error(`expected one of ${Object.keys(tasks).join(', ')}, got ${task}`);
await tasks[task](...args);
