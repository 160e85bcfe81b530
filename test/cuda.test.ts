/** What is said of CUDA where it cannot be used, with drivers and plugins that are not real; and its emulation. */
import { execFileSync, spawnSync } from 'node:child_process';
import { copyFileSync, existsSync, mkdirSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import t from 'tap';
import { packageRoot } from './support/references.js';

interface Said {
  chosen: (string | { code: string; message: string; hint: string })[];
  warnings: string[];
  available: { device: string; name: string; features: string[] }[];
  reasons: { device?: string; code: string; message: string; hint: string }[];
}

const root = packageRoot();
const childOf = (name: string) => fileURLToPath(new URL(`support/${name}.js`, import.meta.url));
const addon = (createRequire(import.meta.url)('node-gyp-build') as { path: (root: string) => string }).path(root);
const build = join(root, 'build', 'generated');
const compiler = ['c++', 'g++', 'clang++'].find((name) => spawnSync(name, ['--version']).status === 0);
const cannotFake =
  process.platform !== 'linux' || !compiler || !existsSync(build)
    ? 'needs Linux, a compiler and a build folder'
    : false;

function ask(devices: readonly string[], env: NodeJS.ProcessEnv): Said {
  return run('cuda-child', devices, { QLORA_CUDA: '', ...env }) as Said;
}

function run(child: string, words: readonly string[], env: NodeJS.ProcessEnv): unknown {
  const options = { env: { ...process.env, ...env }, encoding: 'utf8' } as const;
  return JSON.parse(execFileSync(process.execPath, [childOf(child), ...words], options));
}

/** Compiled with FAKE_DRIVER as a driver, without as a plugin. */
function compileFake(output: string, ...flags: string[]): void {
  execFileSync(compiler as string, [
    '-std=c++20', '-shared', '-fPIC', `-I${join(root, 'csrc')}`, `-I${build}`, ...flags,
    join(root, 'test', 'support', 'fake_cuda.cpp'), '-o', output,
  ]); // biome-ignore format: flags
}

t.test('without a driver', { skip: existsSync('/proc/driver/nvidia') }, async (t) => {
  const { chosen, warnings, available, reasons } = ask(['auto', 'cuda:0'], {});
  const refusal = {
    code: 'ERR_QLORA_DEVICE',
    message: /^no NVIDIA driver is here: libcuda\.so\.1 was not found$/,
    hint: /Install the NVIDIA driver/,
  };
  t.match(chosen, ['cpu', refusal]);
  t.match(reasons, [refusal]);
  t.same(warnings, [], 'nobody asked for CUDA');
  t.match(available, [{ device: 'cpu' }]);
  t.equal(available.length, 1);
});

t.test('with a driver', { skip: cannotFake }, async (t) => {
  const folder = t.testdir();
  const here = join(folder, 'build', 'Release');
  mkdirSync(here, { recursive: true });
  copyFileSync(addon, join(here, 'qlora_node.node'));
  compileFake(join(folder, 'libcuda.so.1'), '-DFAKE_DRIVER');
  const trace = join(folder, 'trace');
  const askWith = (devices: string[], env: Record<string, string>) =>
    ask(devices, {
      QLORA_NODE_PREBUILD: folder,
      LD_LIBRARY_PATH: folder,
      FAKE_TRACE: trace,
      FAKE_DRIVER_VERSION: '13000',
      FAKE_SAME_BUILD: '1',
      FAKE_DEVICES: '1',
      ...env,
    });

  t.same(askWith(['cpu'], {}).chosen, ['cpu']);
  t.notOk(existsSync(trace), "'cpu' opens no driver");

  const refused = (what: string, env: Record<string, string>, message: RegExp, hint: RegExp) => {
    const { chosen, warnings, reasons } = askWith(['cuda:0', 'auto', 'auto'], env);
    t.match(chosen, [{ code: 'ERR_QLORA_DEVICE', message, hint }, 'cpu', 'cpu'], what);
    t.match(reasons, [{ code: 'ERR_QLORA_DEVICE', message, hint }]);
    t.match(warnings, [/^warn: computing on the CPU: /], "'auto' says that there is a driver, and why it is not used");
    t.equal(warnings.length, 1, 'once');
  };
  refused('no plugin', {}, /the CUDA plugin could not be opened: .*libqlora_cuda\.so/, /npm run build:cuda/);
  t.ok(existsSync(trace));

  compileFake(join(here, 'libqlora_cuda.so'));
  refused('another build', { FAKE_SAME_BUILD: '0' }, /belongs to another build .*another/, /Build both together/);
  refused(
    'an old driver',
    { FAKE_DRIVER_VERSION: '11040' },
    /driver is too old: it is for CUDA 11\.4, the plugin needs 13\.0 or later/,
    /Update the NVIDIA driver/,
  );
  refused('no device', { FAKE_DEVICES: '0' }, /the NVIDIA driver finds no device/, /CUDA_VISIBLE_DEVICES/);
  const { chosen } = askWith(['cuda:2'], {});
  t.match(chosen, [{ code: 'ERR_QLORA_DEVICE', message: /no device cuda:2: this machine has 1/ }]);
});

const emulated = join(dirname(addon), 'libqlora_cuda_emulated.so');
const notEmulated = existsSync(emulated) ? false : 'npm run build:cuda-emulated was not run';

t.test('emulated', { skip: notEmulated }, async (t) => {
  const { chosen, available } = ask(['cuda:0', 'cuda:1', 'cuda:4294967296'], { QLORA_CUDA: 'emulated' });
  t.match(chosen, ['cuda:0', { message: /no device cuda:1:/ }, { message: /no device cuda:4294967296/ }]);
  t.match(available, [{ device: 'cpu' }, { device: 'cuda:0', name: /emulated/ }]);
});

t.test("devices that cannot be used, and 'auto'", { skip: notEmulated || cannotFake }, async (t) => {
  const folder = t.testdir();
  compileFake(join(folder, 'libcuda.so.1'), '-DFAKE_DRIVER');
  const askWith = (devices: string[], env: Record<string, string>) =>
    ask(devices, { QLORA_CUDA: 'emulated', LD_LIBRARY_PATH: folder, FAKE_TRACE: join(folder, 'trace'), ...env });

  const tooOld = {
    code: 'ERR_QLORA_DEVICE',
    message: /^cuda:0, .* has compute capability 7\.0, at least 7\.5 is needed/,
    hint: /Turing/,
  };
  const mixed = askWith(['auto', 'cuda:0', 'cuda:1'], { QLORA_CUDA_CAPABILITY: '70,90' });
  t.match(mixed.chosen, ['cuda:1', tooOld, 'cuda:1'], 'one old device does not take the others away');
  t.match(mixed.available, [{ device: 'cpu' }, { device: 'cuda:1', features: ['capability:9.0'] }]);
  t.match(mixed.reasons, [{ ...tooOld, device: 'cuda:0' }]);
  t.same(mixed.warnings, []);
  const old = askWith(['auto', 'auto'], { QLORA_CUDA_CAPABILITY: '70' });
  t.same(old.chosen, ['cpu', 'cpu']);
  t.match(old.warnings, [/^warn: computing on the CPU: cuda:0, .* has compute capability 7\.0/]);
  t.equal(old.warnings.length, 1, 'once');

  const QLORA_CUDA_FAIL = 'cudaMemGetInfo:1';
  t.match(askWith([], { QLORA_CUDA_FAIL }).available, [{ device: 'cpu' }, { device: 'cuda:0' }]);
  const message = /CUDA: asking for free memory failed: an illegal memory access was encountered/;
  t.match(askWith(['cuda:0'], { QLORA_CUDA_FAIL }).chosen, [{ code: 'ERR_QLORA_DEVICE', message }]);
  const broken = askWith(['auto'], { QLORA_CUDA_FAIL });
  t.same(broken.chosen, ['cpu']);
  t.match(broken.warnings, [message], "'auto' tries the device");
});

t.test('calls that fail', { skip: notEmulated }, async (t) => {
  const work = (name: string, QLORA_CUDA_FAIL: string) =>
    run('cuda-failures-child', [name], { QLORA_CUDA: 'emulated', QLORA_CUDA_FAIL });
  const failed = (what: RegExp) => ({
    code: 'ERR_QLORA_DEVICE',
    message: new RegExp(`^CUDA: ${what.source} failed: an illegal memory access was encountered$`),
  });
  t.match(work('allocate', 'cudaMalloc:1'), failed(/taking memory/), 'which is not out of memory');
  t.match(work('limited', 'cudaMemGetInfo:1'), {
    code: 'ERR_QLORA_OUT_OF_MEMORY',
    message: /^out of memory: 4000 bytes of activations were wanted, 0 bytes are in use, the limit is 1000$/,
  });
  t.match(work('launch', 'cudaLaunchKernel:1'), failed(/\w+\.(?:cu|h):\d+/), 'with the place in the sources');
  t.match(work('sync', 'cudaSetDevice:2'), failed(/choosing the device/), 'on the thread of the stream');
  t.equal(work('writes', 'cudaEventSynchronize:1'), 'done', 'small writes do not wait for the device');
  t.equal(work('skippedSteps', 'cudaMemcpyAsync:100'), 'untouched', 'a step that is skipped streams no state');
  t.equal(work('smallSteps', 'cudaMemcpyAsync:200'), 'updated', 'of a slot goes what is used');
});

t.test('the conformance suite on a device that breaks', { skip: notEmulated }, async (t) => {
  const tests = fileURLToPath(new URL('cuda.js', import.meta.url));
  const env = { ...process.env, QLORA_CUDA: 'emulated', QLORA_CUDA_FAIL: 'cudaLaunchKernel:20' };
  const { status, stdout } = spawnSync(process.execPath, [tests, 'recording', 'rms-norm'], { env, encoding: 'utf8' });
  t.equal(status, 1);
  t.match(stdout, /not ok .*CUDA: \w+\.(?:cu|h):\d+ failed: an illegal memory access was encountered/);
  t.match(stdout, /CUDA_LAUNCH_BLOCKING=1 node dist\/test\/cuda\.js ops\/recording.*\n.*\nleft out: ops\/rms-norm/);
});

t.test('what the allocator keeps is part of the budget', { skip: notEmulated }, async (t) => {
  const [before, after] = run('cuda-failures-child', ['budget'], { QLORA_CUDA: 'emulated' }) as number[];
  t.ok(before);
  t.equal(after, before);
});

t.test('what the emulation reports', { skip: compiler ? false : 'needs a compiler' }, async (t) => {
  const program = join(t.testdir(), 'emulation_test');
  const sources = ['emulation_test'].map((name) => join(root, 'test', 'native', `${name}.cpp`));
  const engine = ['engine', 'fiber', 'api'].map((name) => join(root, 'csrc', 'cuda', 'emulated', `${name}.cpp`));
  execFileSync(compiler as string, [
    '-std=c++20',
    '-O1',
    `-I${join(root, 'csrc')}`,
    ...sources,
    ...engine,
    '-o',
    program,
  ]);
  const { status, stdout, stderr } = spawnSync(program, { encoding: 'utf8' });
  t.equal(status, 0, stdout + stderr);
});
