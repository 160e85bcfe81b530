/** Who may import whom (ARCHITECTURE.md), how long a file may be, and what the compiled kernels may share. */
import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { dirname, join, normalize } from 'node:path';
import t from 'tap';
import { conformanceFiles } from './support/conformance-files.js';
import { packageRoot } from './support/references.js';

const root = packageRoot();
const longest = 400;

function filesBelow(folder: string, ends: RegExp): string[] {
  if (!existsSync(join(root, folder))) return [];
  const names = readdirSync(join(root, folder), { recursive: true, withFileTypes: true });
  return names
    .filter((entry) => entry.isFile() && ends.test(entry.name))
    .map((entry) => join(entry.parentPath, entry.name).slice(root.length + 1));
}

const read = (file: string) => readFileSync(join(root, file), 'utf8');

/**
 * lib, lowest first: a file imports from its own line and from those above it that are listed. A name is a folder or a
 * file of lib.
 */
const layers: Record<string, readonly string[]> = {
  'errors.ts': [],
  'logger.ts': [],
  'format.ts': [],
  'event-stream.ts': ['errors.ts'],
  'options.ts': ['errors.ts'],
  'native.ts': ['errors.ts'],
  'tensor.ts': ['errors.ts', 'native.ts'],
  'autograd.ts': ['tensor.ts'],
  ops: ['errors.ts', 'tensor.ts', 'autograd.ts'],
  io: ['errors.ts', 'native.ts', 'tensor.ts'],
  nn: ['errors.ts', 'tensor.ts', 'autograd.ts', 'ops'],
  tokenizer: ['errors.ts'],
  data: ['errors.ts', 'logger.ts', 'format.ts', 'io', 'tokenizer'],
  'quantization.ts': ['errors.ts', 'tensor.ts', 'ops'],
  models: ['errors.ts', 'tensor.ts', 'autograd.ts', 'ops', 'nn', 'io', 'tokenizer'],
  generate: [
    'errors.ts', 'logger.ts', 'options.ts', 'event-stream.ts', 'tensor.ts', 'ops', 'io', 'models', 'data', 'tokenizer',
  ],
  'quantized-model.ts': [
    'devices.ts', 'errors.ts', 'options.ts', 'event-stream.ts', 'logger.ts', 'tensor.ts', 'ops', 'io', 'tokenizer', 'data', 'quantization.ts',
    'models', 'generate',
  ],
  'devices.ts': ['errors.ts', 'logger.ts', 'native.ts'],
  report: ['errors.ts', 'logger.ts', 'format.ts', 'io', 'data'],
  train: [
    'errors.ts', 'options.ts', 'event-stream.ts', 'logger.ts', 'format.ts', 'tensor.ts', 'autograd.ts', 'ops', 'io', 'data',
    'devices.ts', 'models', 'generate', 'quantized-model.ts', 'report',
  ],
  // Its tables and its parsing of files are below; what it runs is imported when it is asked for.
  cli: [
    'errors.ts', 'logger.ts', 'format.ts', 'options.ts', 'io', 'tokenizer', 'data', 'models', 'generate', 'quantized-model.ts',
    'devices.ts', 'train', 'report',
  ],
}; // biome-ignore format: a list of names

/** Types alone may come from anywhere above, where the value that has them is passed down. */
const typesOnly = new Set([
  'devices.ts -> quantized-model.ts',
  'devices.ts -> tensor.ts',
  'ops -> quantization.ts',
  'models -> quantization.ts',
  'report -> train',
]);
/** Only they know the addon. */
const knowTheAddon = /^lib\/(tensor\.ts|devices\.ts|native\.ts|ops\/|io\/)/;
const aboveAll = new Set(['index.ts', 'eval', 'serve']);

interface Import {
  from: string;
  to: string;
  type: boolean;
}

function importsOf(file: string): Import[] {
  const found: Import[] = [];
  for (const [, type, names, path] of read(file).matchAll(
    /^(?:import|export)(\s+type)?\s+((?:[^'";]|\n)*?)\s*from\s+'(\.[^']+)';/gm,
  )) {
    const to = normalize(join(dirname(file), path as string)).replace(/\.js$/, '.ts');
    const all = (names as string)
      .replace(/[{}\s]/g, ' ')
      .split(',')
      .map((n) => n.trim())
      .filter(Boolean);
    found.push({ from: file, to, type: type !== undefined || all.every((name) => name.startsWith('type ')) });
  }
  return found;
}

/** The line of `layers` that a file of lib belongs to. */
const layerOf = (file: string) => file.split('/')[1] as string;

t.test('lib: imports go down', async (t) => {
  const files = filesBelow('lib', /\.ts$/);
  t.ok(files.length > 60);
  let count = 0;
  for (const file of files) {
    const layer = layerOf(file);
    if (aboveAll.has(layer)) continue;
    const allowed = layers[layer];
    t.ok(allowed, `${file}: every file has its layer`);
    for (const { to, type } of importsOf(file)) {
      count++;
      t.ok(existsSync(join(root, to)), `${file}: ${to} is found`);
      const target = layerOf(to);
      if (target === layer || allowed?.includes(target)) continue;
      if (!(type && typesOnly.has(`${layer} -> ${target}`))) t.fail(`${file} may not import ${to}`);
    }
  }
  t.ok(count > 200, `${count} imports were looked at`);
});

t.test('lib: no import leads back to where it came from', async (t) => {
  const edges = new Map(
    filesBelow('lib', /\.ts$/).map((file) => [
      file,
      importsOf(file)
        .filter((i) => !i.type)
        .map((i) => i.to),
    ]),
  );
  const done = new Set<string>();
  const visit = (file: string, path: readonly string[]) => {
    if (path.includes(file)) t.fail(`a circle: ${[...path, file].join(' -> ')}`);
    if (done.has(file) || path.includes(file)) return;
    for (const next of edges.get(file) ?? []) visit(next, [...path, file]);
    done.add(file);
  };
  for (const file of edges.keys()) visit(file, []);
  t.equal(done.size, edges.size);
});

t.test('lib: only families name a model, only the lowest know the addon', async (t) => {
  const families = filesBelow('lib/models/families', /\.ts$/).filter((file) => !file.endsWith('index.ts'));
  const types = families.flatMap((file) =>
    [...(/modelTypes: \[([^\]]+)\]/.exec(read(file))?.[1] ?? '').matchAll(/'([^']+)'/g)].map(
      ([, name]) => name as string,
    ),
  );
  t.ok(types.includes('llama'));
  const name = new RegExp(`['"\`](${types.join('|')})['"\`]`);
  for (const file of filesBelow('lib', /\.ts$/)) {
    // Comments may name what they like.
    const code = read(file).replace(/\/\*[\s\S]*?\*\/|\/\/.*$/gm, '');
    if (!file.startsWith('lib/models/families/') && name.test(code))
      t.fail(`${file} names a model: ${name.exec(code)?.[0]}`);
    const native = importsOf(file).some(({ to }) => to === 'lib/native.ts');
    if (native && !knowTheAddon.test(file)) t.fail(`${file} imports the addon`);
  }
});

t.test('lib: the help of a command needs neither the addon nor the tokenizer', async (t) => {
  const seen = new Set<string>();
  const visit = (file: string) => {
    if (seen.has(file)) return;
    seen.add(file);
    for (const { to, type } of importsOf(file)) if (!type) visit(to);
  };
  for (const file of ['lib/cli/main.ts', 'lib/cli/program.ts', ...filesBelow('lib/cli/commands', /\.ts$/)]) visit(file);
  t.ok(seen.size > 20, `${seen.size} files`);
  for (const file of seen) {
    if (!/^lib\/(cli\/|errors\.ts|format\.ts|options\.ts|io\/json\.ts)/.test(file))
      t.fail(`${file} is imported for a help text`);
  }
});

t.test("CUDA's tests and bench need no package", async (t) => {
  const seen = new Set<string>();
  const visit = (path: readonly string[]) => {
    const file = path.at(-1) as string;
    if (seen.has(file)) return;
    seen.add(file);
    // What was compiled: of an import of types there may be left that the module is loaded.
    for (const [, to] of read(file).matchAll(/^(?:import|export)(?:\s[^'"`=(;]*?\sfrom)?\s+'([^']+)';$/gm)) {
      if (to?.startsWith('.')) visit([...path, normalize(join(dirname(file), to))]);
      else if (!to?.startsWith('node:')) t.fail(`${path.join(' -> ')} imports ${to}`);
    }
  };
  for (const file of ['cuda', ...conformanceFiles.map((file) => `${file}.test`)]) visit([`dist/test/${file}.js`]);
  visit(['dist/bench/cuda.js']);
  t.ok(seen.size > 80, `${seen.size} files`);
});

t.test('csrc: napi -> ops -> simd -> core', async (t) => {
  const below: Record<string, readonly string[]> = {
    core: ['core'],
    simd: ['simd', 'core'],
    ops: ['ops', 'simd', 'core'],
    cuda: ['cuda', 'ops', 'simd', 'core'],
    napi: ['napi', 'ops', 'core'],
  };
  const files = filesBelow('csrc', /\.(h|cpp|cu|cuh)$/);
  t.ok(files.length > 70);
  const generated = new Set(['cpu_isas.h', 'plugin_build.h']); // by CMake
  const stemOf = (path: string) => path.replace(/\.\w+$/, '');
  const headers = new Set(files.filter((file) => file.endsWith('.h')).map((file) => file.slice('csrc/'.length)));
  let count = 0;
  for (const file of files) {
    const [, folder] = file.split('/') as [string, string];
    for (const [, included] of read(file).matchAll(/^#include "([^"]+)"/gm)) {
      const target = included as string;
      if (generated.has(target)) continue;
      count++;
      t.ok(headers.has(target), `${file}: ${target} is found`);
      const isKernel = folder === 'ops' && file.endsWith('.cu') && target.startsWith('cuda/');
      const isWeight = folder === 'simd' && target === 'ops/weight.h';
      if (!isWeight && !isKernel && !below[folder]?.includes(target.split('/')[0] as string))
        t.fail(`${file} may not include ${target}`);
      if (
        folder === 'ops' &&
        target.startsWith('ops/') &&
        !mayInclude(stemOf(file.slice('csrc/ops/'.length)), stemOf(target.slice('ops/'.length)))
      ) {
        t.fail(`${file} includes another op's header, ${target}`);
      }
    }
    if (folder === 'core' && /napi\.h|node_api/.test(read(file))) t.fail(`${file} knows JavaScript`);
  }
  t.ok(count > 200, `${count} includes were looked at`);
});

/** An op includes its own headers, which share its first word, and the one that says what a weight is. */
function mayInclude(stem: string, target: string): boolean {
  const tables = ['op_table', 'cpu_table', 'cpu_select', 'cuda_select'];
  if (tables.includes(stem)) return true;
  // Of matmul the checks of shapes, which LoRA's ops make too.
  if (target === 'matmul' && ['dora', 'lora_linear'].includes(stem)) return true;
  return target === 'weight' || target === stem || stem.split('_')[0] === target.split('_')[0];
}

t.test(`no file has more than ${longest} lines`, async (t) => {
  const files = ['lib', 'csrc', 'test', 'bench', 'examples', 'scripts'].flatMap((folder) =>
    filesBelow(folder, /\.(ts|mjs|h|cpp|cu|py)$/),
  );
  const own = files.filter((file) => !/node_modules|references/.test(file));
  for (const file of own) {
    const lines = read(file).split('\n').length - 1;
    if (lines > longest) t.fail(`${file} has ${lines} lines: split it by idea`);
  }
  t.ok(own.length > 150);
});

/**
 * The kernels are compiled once for each instruction set. Of an inline function that two object files define, the linker
 * keeps one: it must not be one that was compiled for an instruction set that the machine may lack.
 */
const isas = ['scalar', 'avx2', 'avx512', 'avx512bf16', 'amx'];
const host = ['napi', 'core'];
const objectsOf = (isa: string) => filesBelow(`build/CMakeFiles/kernels_${isa}.dir`, /\.o$/);
const nm = spawnSync('nm', ['--version']).status === 0;
const cannotLook = !nm ? 'nm is not here' : objectsOf('scalar').length === 0 ? 'there is no build folder' : false;

/** What object files define that the linker may take from any of them. */
function weakSymbols(objects: readonly string[]): Set<string> {
  const text = execFileSync('nm', ['-C', '--defined-only', ...objects.map((o) => join(root, o))], {
    encoding: 'utf8',
    maxBuffer: 2 ** 28,
  });
  return new Set([...text.matchAll(/^\w+ [WVu] (.*)$/gm)].map(([, name]) => name as string));
}

t.test('no code for a better processor runs on a lesser one', { skip: cannotLook }, async (t) => {
  const scalar = weakSymbols(objectsOf('scalar'));
  const common = weakSymbols(host.flatMap((part) => filesBelow(`build/CMakeFiles/${part}.dir`, /\.o$/)));
  t.ok(common.size > 50);
  for (const isa of isas.slice(1)) {
    const objects = objectsOf(isa);
    if (objects.length === 0) continue;
    const outside = [...weakSymbols(objects)].filter((name) => !name.includes(`qlora::${isa}::`));
    // Both stand before them in the link, so their copies would win; better that there is nothing to choose.
    t.same(
      outside.filter((name) => common.has(name) && !scalar.has(name)),
      [],
      `${isa}: symbols shared with what runs everywhere`,
    );
    for (const other of isas) {
      if (other !== isa)
        t.notOk(
          outside.some((name) => name.includes(`qlora::${other}::`)),
          `${isa} and ${other} share nothing`,
        );
    }
  }
  const ninja = join(root, 'build', 'build.ninja');
  if (!existsSync(ninja)) return;
  const link = /^build \S*qlora_node\.node: (.*)$/m.exec(readFileSync(ninja, 'utf8'))?.[1] ?? '';
  const order = [...host, ...isas.map((isa) => `kernels_${isa}`)]
    .filter((part) => link.includes(`/${part}.dir`))
    .map((part) => [part, link.indexOf(`/${part}.dir`), link.lastIndexOf(`/${part}.dir`)] as const);
  t.same(
    order.slice(0, 2).map(([part]) => part),
    host,
  );
  for (const [i, [part, first]] of order.entries())
    t.ok(first > (order[i - 1]?.[2] ?? 0), `${part} is linked after what needs less`);
});
