// Builds CUDA's plugin beside the addon, and the addon where it is not of the same state of the sources.
//   node scripts/build-cuda.mjs              for all architectures; needs nvcc
//   node scripts/build-cuda.mjs --arch 90a   for one
//   node scripts/build-cuda.mjs --emulated   the plugin that computes on the CPU, for tests
import { execFileSync } from 'node:child_process';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const { values } = parseArgs({
  options: { arch: { type: 'string' }, emulated: { type: 'boolean', default: false } },
});
const root = fileURLToPath(new URL('..', import.meta.url));
const cmakeJs = join(dirname(createRequire(import.meta.url).resolve('cmake-js/package.json')), 'bin', 'cmake-js');
// CMake would go on with the architectures of the last time.
const architectures = values.arch ? `${values.arch}-real` : 'default';
const settings = values.emulated
  ? ['--CDQLORA_CUDA_EMULATED=ON']
  : ['--CDQLORA_CUDA=ON', `--CDQLORA_CUDA_ARCHITECTURES=${architectures}`];
const run = (command, ...args) => execFileSync(command, args, { cwd: root, stdio: 'inherit' });
run(process.execPath, cmakeJs, 'configure', ...settings);
const plugin = values.emulated ? 'qlora_cuda_emulated' : 'qlora_cuda';
run('cmake', '--build', 'build', '--config', 'Release', '--parallel', '2', '--target', 'qlora_node', plugin);
