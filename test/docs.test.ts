/** The documentation says what the code says: programs compile and run, links lead somewhere, tables are complete. */
import { execFileSync } from 'node:child_process';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import t from 'tap';
import ts from 'typescript';
import { formatNames } from '../lib/data/rows.js';
import { templateNames } from '../lib/data/templates.js';
import { QuantizedModel } from '../lib/index.js';
import { packageRoot } from './support/references.js';

const root = packageRoot();
t.setTimeout(600_000); // a busy machine trains slowly
const read = (file: string) => readFileSync(join(root, file), 'utf8');

function filesBelow(folder: string, end: string): string[] {
  const entries = readdirSync(join(root, folder), { recursive: true, withFileTypes: true });
  return entries
    .filter((entry) => entry.isFile() && entry.name.endsWith(end))
    .map((entry) => join(entry.parentPath, entry.name).slice(root.length + 1))
    .sort();
}

/** What users read. docs/api is generated. */
const pages = ['README.md', ...filesBelow('docs', '.md').filter((file) => !file.startsWith(join('docs', 'api')))];
const allPages = [...pages, 'ARCHITECTURE.md', 'CONTRIBUTING.md', 'CHANGELOG.md'];

/** The blocks of a page that are fenced as `language`. */
function blocksOf(page: string, language: string): string[] {
  return [...read(page).matchAll(/^```(\w+)\n([\s\S]*?)^```$/gm)]
    .filter(([, l]) => l === language)
    .map(([, , b]) => b as string);
}

/** Names in code style that the first column of a page's tables holds. */
function firstColumn(page: string): string[] {
  const cells = [...read(page).matchAll(/^\|([^|]*)\|/gm)].map(([, cell]) => cell as string);
  return cells.flatMap((cell) => [...cell.matchAll(/`([^`]+)`/g)].map(([, name]) => name as string));
}

/** A program over lib/index.ts and `blocks`, each a module in the package's folder that imports it by its name. */
function programOf(blocks: ReadonlyMap<string, string>): ts.Program {
  const { config } = ts.readConfigFile(join(root, 'tsconfig.json'), ts.sys.readFile);
  const { options } = ts.parseJsonConfigFileContent({ ...config, files: ['lib/index.ts'], include: [] }, ts.sys, root);
  Object.assign(options, {
    noEmit: true,
    noUnusedLocals: false,
    paths: { 'qlora-node': [join(root, 'lib/index.ts')] },
  });
  const host = ts.createCompilerHost(options);
  const { fileExists, readFile } = host;
  host.fileExists = (file) => blocks.has(file) || fileExists(file);
  host.readFile = (file) => blocks.get(file) ?? readFile(file);
  return ts.createProgram([join(root, 'lib/index.ts'), ...blocks.keys()], options, host);
}

const blocks = new Map<string, string>();
for (const page of pages) {
  blocksOf(page, 'ts').forEach((block, i) => {
    blocks.set(join(root, `${page.replaceAll(/[/\\.]/g, '-')}-${i + 1}.ts`), block);
  });
}
const program = programOf(blocks);
const checker = program.getTypeChecker();
const index = program.getSourceFile(join(root, 'lib/index.ts'));
const exported = checker.getExportsOfModule(checker.getSymbolAtLocation(index as ts.SourceFile) as ts.Symbol);

t.test('every block of TypeScript compiles', async (t) => {
  t.ok(blocks.size >= 15, `${blocks.size} blocks`);
  for (const file of blocks.keys()) {
    const source = program.getSourceFile(file);
    const found = [...program.getSyntacticDiagnostics(source), ...program.getSemanticDiagnostics(source)];
    const texts = found.map(({ messageText, start = 0 }) => {
      const { line } = (source as ts.SourceFile).getLineAndCharacterOfPosition(start);
      return `line ${line + 1}: ${ts.flattenDiagnosticMessageText(messageText, '\n')}`;
    });
    t.same(texts, [], file.slice(root.length + 1));
  }
});

t.test("README's program runs as README says", async (t) => {
  const [source] = blocksOf('README.md', 'ts');
  const folder = join(root, 'dist', 'readme');
  t.teardown(() => rmSync(folder, { recursive: true, force: true }));
  mkdirSync(folder, { recursive: true });
  const saved = join(folder, 'double.mjs');
  // The one change: what it writes goes away with the test.
  const output = join(folder, 'adapter');
  writeFileSync(saved, (source as string).replace("'demo-output/double'", JSON.stringify(output)));
  const text = execFileSync(process.execPath, [saved], {
    cwd: root,
    encoding: 'utf8',
    env: { ...process.env, NODE_OPTIONS: '' },
  });
  const lines = text.trim().split('\n');
  t.match(lines[0] as string, /^step 10: loss \d/);
  t.equal(lines.at(-1), '42');
  t.ok(existsSync(join(output, 'adapter_model.safetensors')));
});

t.test('every program of the recipes runs, one page after the other, as somebody who reads them all', async (t) => {
  const [modules, home] = [join(root, 'dist', 'recipes-of-docs'), mkdtempSync(join(tmpdir(), 'qlora-docs-'))];
  t.teardown(() => {
    for (const folder of [modules, home]) rmSync(folder, { recursive: true });
  });
  mkdirSync(modules, { recursive: true });
  const demo = join(root, 'examples', 'demo', 'model');
  for (const name of ['models/TinyLlama-1.1B', 'TinyLlama/TinyLlama-1.1B-Chat-v1.0', 'examples/demo/model']) {
    mkdirSync(join(home, dirname(name)), { recursive: true });
    symlinkSync(demo, join(home, name));
  }
  const tickets = Array.from({ length: 40 }, (_, n) => ({
    instruction: 'Double it.',
    input: `${n}`,
    output: `${2 * n}`,
  }));
  const jsonl = tickets.map((row) => JSON.stringify(row)).join('\n');
  mkdirSync(join(home, 'data', 'ultrachat'), { recursive: true });
  writeFileSync(join(home, 'data', 'tickets.jsonl'), jsonl);
  writeFileSync(
    join(home, 'data', 'tickets.csv'),
    `instruction,output\n${tickets.map(({ input, output }) => `${input},${output}`).join('\n')}`,
  );
  writeFileSync(join(home, 'data', 'ultrachat', 'train.jsonl'), jsonl);
  {
    await using model = await QuantizedModel.load(demo);
    const adapter = model.addLora('theirs', { r: 4 });
    for (const name of ['adapters/summaries', 'adapters/from-peft', 'someone/an-adapter']) {
      await adapter.save(join(home, name));
    }
  }

  const names: string[] = [];
  for (const page of pages.filter((file) => file.startsWith(join('docs', 'recipes')))) {
    blocksOf(page, 'ts').forEach((block, i) => {
      const { outputText } = ts.transpileModule(block, {
        compilerOptions: { target: ts.ScriptTarget.ES2022, module: ts.ModuleKind.ESNext },
      });
      const name = `${basename(page, '.md')}-${i + 1}`;
      // The one change: any port that is free.
      writeFileSync(join(modules, `${name}.mjs`), outputText.replace('listen(8080)', 'listen(0)'));
      names.push(name);
    });
  }
  const main = join(modules, 'all.mjs');
  const imports = names.map((name) => `console.log('\\n:: ${name}'); await import('./${name}.mjs');`);
  writeFileSync(main, [...imports, 'process.exit();'].join('\n'));
  const env = { ...process.env, NODE_OPTIONS: '', HF_HUB_OFFLINE: '1' };
  const said = execFileSync(process.execPath, [main], { cwd: home, encoding: 'utf8', env }).split(/^:: /m).slice(1);
  t.same(
    said.map((text) => text.slice(0, text.indexOf('\n'))),
    names,
  );
  const of = (name: string) => said[names.indexOf(name)] as string;
  t.match(of('fine-tune-on-your-rows-1'), /^loss \S+, adapter in adapters\/tickets$/m);
  t.match(of('fine-tune-on-your-rows-4'), /^(\d\S*\n){100}/m, "steps of a loop of one's own");
  t.match(of('look-at-a-run-1'), /^step \d+: loss \d/m);
  t.match(of('merge-1'), /^logits moved by \d/m);
  t.match(of('stop-and-resume-1'), /^done$/m);
});

t.test('links lead somewhere', async (t) => {
  const headings = (page: string) =>
    [...read(page).matchAll(/^#+ (.*)$/gm)].map(([, h]) =>
      (h as string)
        .toLowerCase()
        .replace(/[^\w\- ]/g, '')
        .replaceAll(' ', '-'),
    );
  for (const page of allPages) {
    for (const [, target = ''] of read(page).matchAll(/\]\(([^)\s]+)\)/g)) {
      if (/^[a-z]+:/.test(target)) continue;
      const [path = '', anchor] = target.split('#');
      const file = path ? join(dirname(page), path) : page;
      t.ok(existsSync(join(root, file)), `${page}: ${target}`);
      if (anchor) t.ok(headings(file).includes(anchor), `${page}: ${target}`);
    }
  }
});

t.test('docs/errors.md lists exactly the codes of lib and csrc', async (t) => {
  const codesIn = (files: readonly string[]) =>
    [
      ...new Set(
        files.flatMap((file) => [...read(file).matchAll(/ERR_QLORA_[A-Z0-9_]*[A-Z0-9]/g)].map(([code]) => code)),
      ),
    ].sort();
  const source = [...filesBelow('lib', '.ts'), ...filesBelow('csrc', '.h'), ...filesBelow('csrc', '.cpp')];
  t.ok(source.length > 100);
  const rows = firstColumn('docs/errors.md').filter((name) => name.startsWith('ERR_QLORA_'));
  t.same(rows.toSorted(), codesIn(source));
  for (const page of allPages) for (const code of codesIn([page])) t.ok(rows.includes(code), `${page}: ${code}`);
});

t.test('the public names are exported', async (t) => {
  // MemoryPlan comes with QLoRATrainer.plan().
  const promised = [
    ...['Device', 'QLoRAError', 'MemoryUse', 'backends', 'memory', 'setLogger', 'QuantizeOptions', 'QuantizedData'],
    ...['quantize', 'dequantize', 'LoadOptions', 'ChatMessage', 'AdapterChoice', 'GenerateOptions', 'TextStream'],
    ...['TokenStream', 'QuantizedModel', 'LoraOptions', 'LoraAdapter', 'LoraLinear', 'Row', 'DatasetSource'],
    ...['MixedDataset', 'TrainerOptions', 'TrainEvent', 'TrainResult', 'TrainRun', 'QLoRATrainer'],
  ];
  const names = exported.map(({ name }) => name);
  for (const name of promised) t.ok(names.includes(name), name);
});

t.test('tables of options, formats and templates are complete', async (t) => {
  const optionsOf = (name: string) => {
    const symbol = exported.find((s) => s.name === name) as ts.Symbol;
    const type = checker.getDeclaredTypeOfSymbol(
      symbol.flags & ts.SymbolFlags.Alias ? checker.getAliasedSymbol(symbol) : symbol,
    );
    return type
      .getProperties()
      .map((p) => p.name)
      .sort();
  };
  const choosing = firstColumn('docs/recipes/choosing-options.md');
  const rows = choosing.slice(choosing.indexOf('model')).sort();
  t.same(rows, optionsOf('TrainerOptions'), 'TrainerOptions');
  const generate = firstColumn('docs/recipes/generate.md');
  t.same(generate.slice(generate.indexOf('maxNewTokens')).sort(), optionsOf('GenerateOptions'), 'GenerateOptions');
  const formats = firstColumn('docs/recipes/data-formats.md');
  t.same(
    formats.toSorted(),
    [...formatNames(), ...templateNames(), 'datasetFormat', 'template'].sort(),
    'formats and templates',
  );
});
