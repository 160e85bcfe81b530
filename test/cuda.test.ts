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
  reasons: { code: string; message: string; hint: string }[];
}

const root = packageRoot();
const child = fileURLToPath(new URL('support/cuda-child.js', import.meta.url));
const addon = (createRequire(import.meta.url)('node-gyp-build') as { path: (root: string) => string }).path(root);
const build = join(root, 'build', 'generated');
const compiler = ['c++', 'g++', 'clang++'].find((name) => spawnSync(name, ['--version']).status === 0);
const cannotFake =
  process.platform !== 'linux' || !compiler || !existsSync(build)
    ? 'needs Linux, a compiler and a build folder'
    : false;

function ask(devices: readonly string[], env: NodeJS.ProcessEnv): Said {
  const output = execFileSync(process.execPath, [child, ...devices], {
    env: { ...process.env, QLORA_CUDA: '', ...env },
    encoding: 'utf8',
  });
  return JSON.parse(output) as Said;
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
  const compile = (name: string, ...flags: string[]) =>
    execFileSync(compiler as string, [
      '-std=c++20', '-shared', '-fPIC', `-I${join(root, 'csrc')}`, `-I${build}`, ...flags,
      join(root, 'test', 'support', 'fake_cuda.cpp'), '-o', join(folder, name),
    ]); // biome-ignore format: flags
  compile('libcuda.so.1', '-DFAKE_DRIVER');
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
    const { chosen, warnings, reasons } = askWith(['cuda:0', 'auto'], env);
    t.match(chosen, [{ code: 'ERR_QLORA_DEVICE', message, hint }, 'cpu'], what);
    t.match(reasons, [{ code: 'ERR_QLORA_DEVICE', message, hint }]);
    t.match(warnings, [/^warn: computing on the CPU: /], "'auto' says that there is a driver, and why it is not used");
  };
  refused('no plugin', {}, /the CUDA plugin could not be opened: .*libqlora_cuda\.so/, /npm run build:cuda/);
  t.ok(existsSync(trace));

  compile('build/Release/libqlora_cuda.so');
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
t.test('emulated', { skip: existsSync(emulated) ? false : 'npm run build:cuda-emulated was not run' }, async (t) => {
  const { chosen, available } = ask(['cuda:0', 'cuda:1'], { QLORA_CUDA: 'emulated' });
  t.match(chosen, ['cuda:0', { message: /no device cuda:1/ }]);
  t.match(available, [{ device: 'cpu' }, { device: 'cuda:0', name: /emulated/ }]);
  const old = ask(['cuda:0'], { QLORA_CUDA: 'emulated', QLORA_CUDA_CAPABILITY: '70' });
  t.match(old.chosen, [{ message: /has compute capability 7\.0, at least 7\.5 is needed/, hint: /Turing/ }]);
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
