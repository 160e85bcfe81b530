/** The recipes of examples/recipes: two spellings of one run each, and a run that learns. */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, realpathSync, rmSync, symlinkSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { isDeepStrictEqual } from 'node:util';
import t from 'tap';
import { families, recipes, spellings } from '../examples/recipes/grid.js';
import { allRules, valueOfFlag } from '../lib/cli/config/draft.js';
import { readConfiguration, trainerOptions } from '../lib/cli/config/resolve.js';
import type { Rule } from '../lib/cli/config/rules.js';
import { resolveTrainerOptions } from '../lib/train/options.js';
import { cli } from './support/cli.js';
import { packageRoot } from './support/references.js';

t.setTimeout(600_000); // a busy machine trains slowly
// The recipes' paths begin at the package's folder; what they write goes away with the test.
const folder = realpathSync(mkdtempSync(join(tmpdir(), 'qlora-recipes-')));
symlinkSync(join(packageRoot(), 'examples'), join(folder, 'examples'));
const before = process.cwd();
process.chdir(folder);
t.teardown(() => {
  process.chdir(before);
  rmSync(folder, { recursive: true });
});

function run(name: string, ...args: string[]): string[] {
  const program = fileURLToPath(new URL(`../examples/recipes/${name}.js`, import.meta.url));
  const env = { ...process.env, NODE_OPTIONS: '' };
  return execFileSync(process.execPath, [program, ...args], { env, encoding: 'utf8' })
    .trim()
    .split('\n');
}

const fileOf = (name: string) => join('examples', 'recipes', `${name}.yaml`);
type Options = Record<string, unknown>;

/** Rows to train on and to evaluate on are one path in either spelling. */
function comparable({ dataset, outputDir, ...options }: Options): Options {
  const [{ source }] = Array.isArray(dataset) ? dataset : [{ source: dataset }];
  return { ...options, dataset: source };
}

/** What makes each recipe that recipe, and what only one spelling says. */
const expected: Readonly<Record<(typeof families)[number], { options: Options; different: readonly string[] }>> = {
  guanaco: {
    options: {
      lora: { r: 64, alpha: 16, dropout: 0.1, targetModules: 'all-linear' },
      quantization: { type: 'nf4', doubleQuant: true },
      computeDtype: 'bf16',
      batchSize: 1,
      gradientAccumulationSteps: 16,
      lrScheduler: 'constant',
      optimizer: 'paged_adamw_32bit',
      maxGradNorm: 0.3,
      groupByLength: true,
      datasetFormat: 'oasst1',
      sourceMaxLength: 16,
      targetMaxLength: 512,
    },
    different: ['datasetFormat', 'maxLength', 'sourceMaxLength', 'targetMaxLength'],
  },
  'lora-land': {
    options: {
      lora: { r: 8, alpha: 16, targetModules: 'all-linear' },
      quantization: { type: 'nf4' },
      batchSize: 1,
      gradientAccumulationSteps: 16,
      lrScheduler: 'cosine',
      warmupRatio: 0.03,
      groupByLength: false,
      optimizer: 'paged_adamw_32bit',
    },
    different: [],
  },
  raschka: {
    options: {
      lora: { r: 8, alpha: 16, dropout: 0.05, targetModules: ['q_proj', 'v_proj'] },
      quantization: { type: 'nf4' },
      batchSize: 4,
      lrScheduler: 'constant_with_warmup',
      warmupSteps: 10,
      weightDecay: 0.01,
      groupByLength: false,
      optimizer: 'adamw_32bit',
    },
    // warmupSteps wins over it.
    different: ['warmupRatio'],
  },
};

t.test('rows, which hold none of those that are asked', async (t) => {
  t.same(run('make-data'), ['4800 rows to train on are in demo-output/recipes']);
  for (const suffix of ['', '-text']) {
    const [train, evaluated] = ['train', 'eval'].map((name) =>
      readFileSync(join('demo-output', 'recipes', `${name}${suffix}.jsonl`), 'utf8')
        .trim()
        .split('\n'),
    ) as [string[], string[]];
    t.equal(train.length, 4800);
    t.equal(evaluated.length, 160);
    const trained = new Set(train);
    t.same(
      evaluated.filter((row) => trained.has(row)),
      [],
      suffix,
    );
  }
});

t.test('both spellings ask for the same run', async (t) => {
  for (const family of families) {
    const [ours, theirs] = (await Promise.all(
      spellings.map(async (spelling) => {
        const { status, stderr, objects } = await cli(['train', fileOf(family + spelling), '--print-config', '--json']);
        t.equal(status, 0, stderr);
        return comparable(objects[0] as Options);
      }),
    )) as [Options, Options];
    const { options, different } = expected[family];
    t.match(ours, options, family);
    t.ok((ours.maxSteps as number) <= 300);
    const keys = [...new Set([...Object.keys(ours), ...Object.keys(theirs)])].sort();
    const apart = keys.filter((key) => !isDeepStrictEqual(ours[key], theirs[key]));
    t.same(apart, different, family);
  }
});

t.test("each point of the grid changes raschka's options, in either spelling", async (t) => {
  const points = recipes.filter(({ change }) => change !== '');
  t.ok(points.length >= 8);
  for (const { name, change, overrides } of points) {
    for (const spelling of spellings) {
      const rules = allRules(spelling === '' ? 'qlora' : 'llama-factory');
      const flags = Object.entries(overrides).map(([key, value]) => ({
        key,
        value: valueOfFlag(rules[key] as Rule, String(value)),
        place: `--${key}`,
      }));
      const [changed, plain] = await Promise.all(
        [flags, []].map(async (given) => {
          const { options } = await readConfiguration(fileOf(name + spelling), given);
          return resolveTrainerOptions(trainerOptions(options)) as Options;
        }),
      );
      const wanted = structuredClone(plain) as Options & { lora: Options };
      for (const [key, value] of Object.entries(overrides)) {
        const [outer, inner] = key.split('.') as [string, string?];
        if (inner === undefined) wanted[outer] = value;
        else (wanted[outer] as Options)[inner] = value;
      }
      t.same(changed, wanted, `${change}${spelling}`);
    }
  }
});

t.test('a recipe learns', async (t) => {
  const lines = run('run', '--steps', '20', '--only', 'guanaco', '--questions', '8');
  t.equal(lines.length, 3, 'a heading, and a row');
  const [name, , steps, , start, end] = (lines[2] as string)
    .split('|')
    .slice(1)
    .map((cell) => cell.trim());
  t.same([name, steps], ['guanaco', '20']);
  t.ok(Number(start) > 1 && Number(end) < 0.6 * Number(start), `from ${start} to ${end}`);
});
