// Puts the addon that was built here into prebuilds/, stripped, under the name that node-gyp-build looks for.
import { execFileSync } from 'node:child_process';
import { copyFileSync, existsSync, mkdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const built = `${root}/build/Release/qlora_node.node`;
if (!existsSync(built)) throw new Error('nothing is built: run `npm run build:native` first');
const musl = process.platform === 'linux' && !process.report.getReport().header.glibcVersionRuntime;
const libc = process.platform === 'linux' ? (musl ? '.musl' : '.glibc') : '';
const folder = `${root}/prebuilds/${process.platform}-${process.arch}`;
const target = `${folder}/node.napi${libc}.node`;
mkdirSync(folder, { recursive: true });
copyFileSync(built, target);
execFileSync('strip', process.platform === 'darwin' ? ['-x', target] : ['--strip-unneeded', target]);
console.log(target);
