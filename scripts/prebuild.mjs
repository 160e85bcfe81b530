// Puts an addon that was built here into prebuilds/, stripped, under the name that node-gyp-build looks for.
//   node scripts/prebuild.mjs         this machine's
//   node scripts/prebuild.mjs arm64   the one for Linux on 64-bit ARM that `npm run test:arm64` has cross-compiled, with
//                                     the portable code, which it leaves out: tests run that on other processors
import { execFileSync } from 'node:child_process';
import { copyFileSync, existsSync, mkdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const musl = process.platform === 'linux' && !process.report.getReport().header.glibcVersionRuntime;
const libc = process.platform === 'linux' ? (musl ? '.musl' : '.glibc') : '';
const targets = {
  here: {
    platform: process.platform,
    arch: process.arch,
    libc,
    build: 'build',
    script: 'build:native',
    strip: 'strip',
  },
  arm64: {
    platform: 'linux',
    arch: 'arm64',
    libc: '.glibc',
    build: 'build/arm64/build',
    script: 'test:arm64',
    strip: 'aarch64-linux-gnu-strip',
  },
};
const name = process.argv[2] ?? 'here';
if (!Object.hasOwn(targets, name)) throw new Error(`expected nothing or arm64, got ${name}`);
const { platform, arch, libc: suffix, build, script, strip } = targets[name];
const built = `${root}/${build}/Release/qlora_node.node`;
if (!existsSync(built)) throw new Error(`nothing is built: run \`npm run ${script}\` first`);
if (name === 'arm64') {
  const cmake = (...args) => execFileSync('cmake', args, { cwd: root, stdio: 'inherit' });
  cmake('-S', '.', '-B', build, '-UQLORA_ISAS');
  cmake('--build', build, '--parallel', '2');
}
const folder = `${root}/prebuilds/${platform}-${arch}`;
const target = `${folder}/node.napi${suffix}.node`;
mkdirSync(folder, { recursive: true });
copyFileSync(built, target);
execFileSync(strip, platform === 'darwin' ? ['-x', target] : ['--strip-unneeded', target]);
console.log(target);
