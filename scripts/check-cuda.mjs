// CUDA's plugin without a GPU: where nvcc has built it, it exports one symbol, needs no library of CUDA's, and without a
// driver is refused politely; its kernels pass the conformance suite by emulation.
import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const tests = join(root, 'dist', 'test', 'cuda.js');

function demand(condition, what) {
  if (!condition) throw new Error(what);
}

const plugin = join(root, 'build', 'Release', 'libqlora_cuda.so');
if (existsSync(plugin)) {
  const symbols = execFileSync('nm', ['-D', '--defined-only', plugin], { encoding: 'utf8' });
  const names = symbols.split('\n').flatMap((line) => line.split(' ')[2] ?? []);
  demand(names.join() === 'qlora_cuda_plugin', `the plugin exports ${names.join(', ')}`);
  const dynamic = execFileSync('readelf', ['-d', plugin], { encoding: 'utf8' });
  const libraries = [...dynamic.matchAll(/NEEDED.*\[(.*)\]/g)].map(([, name]) => name);
  demand(libraries.length > 0 && !libraries.some((name) => /cu(da|blas|rt)/.test(name)), `it needs ${libraries}`);
  console.log(`the plugin exports ${names}, needs ${libraries.join(', ')}`);
  if (!existsSync('/proc/driver/nvidia')) {
    const { status, stdout } = spawnSync(process.execPath, [tests], { encoding: 'utf8' });
    demand(status === 2 && /no NVIDIA driver is here/.test(stdout), `without a driver: exit code ${status}, ${stdout}`);
  }
} else {
  console.log('nvcc is not here: the plugin was not compiled');
}

execFileSync(process.execPath, [join(root, 'scripts', 'build-cuda.mjs'), '--emulated'], {
  cwd: root,
  stdio: 'inherit',
});
const { conformanceFiles } = await import('../dist/test/support/conformance-files.js');
const sum = { passed: 0, failed: 0 };
const runs = [
  ...conformanceFiles.map((file) => ({ file })),
  // With the least shared memory that there is; and with rows dealt to as many blocks as on a large GPU.
  ...['ops/projections', 'ops/attention'].map((file) => ({ file, like: { QLORA_CUDA_CAPABILITY: '75' } })),
  { file: 'ops/projections', like: { QLORA_CUDA_MULTIPROCESSORS: '132' } },
];
// Each in a process of its own: all memory that a process keeps of the device is protected anew with every kernel.
for (const { file, like } of runs) {
  const { stdout, status } = spawnSync(process.execPath, [tests, file], {
    cwd: root,
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'inherit'],
    env: { ...process.env, ...like, QLORA_CUDA: 'emulated' },
  });
  const [, passed, failed] = /^(\d+) passed, (\d+) failed$/m.exec(stdout) ?? [];
  sum.passed += Number(passed ?? 0);
  sum.failed += status === 0 ? 0 : Math.max(1, Number(failed ?? 0));
  process.stdout.write(stdout);
}
console.log(`cuda: ${sum.passed} passed, ${sum.failed} failed`);
process.exitCode = sum.failed ? 1 : 0;
