/**
 * Trains every recipe as its file says, through the command line, and prints the table of docs/recipes/known-recipes.md.
 *
 *   node dist/examples/recipes/run.js [--steps 300] [--only NAME] [--questions 100]
 *
 * --steps: as many instead of what the files say. --only: the recipes whose name this is.
 * --questions: subtractions that each adapter is asked, none of which it was trained on.
 */
import { execFile } from 'node:child_process';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs, promisify } from 'node:util';
import { QLoRATrainer, type TrainerOptions } from '../../lib/index.js';
import { percent } from '../../lib/report/format.js';
import { accuracy, ask } from '../demo/measure.js';
import type { Question } from '../demo/old-skills.js';
import { type Recipe, recipes } from './grid.js';
import { dataFolder, writeData } from './make-data.js';

const { values } = parseArgs({
  options: { steps: { type: 'string' }, only: { type: 'string' }, questions: { type: 'string', default: '100' } },
});

const commandLine = fileURLToPath(new URL('../../lib/cli/main.js', import.meta.url));
const recipeFolder = join('examples', 'recipes');

const { subtractions } = writeData();
const questions = subtractions.slice(0, Number(values.questions));
console.log('| recipe | change | steps | first loss | eval loss before | eval loss after | right answers |');
console.log('| --- | --- | --- | --- | --- | --- | --- |');
for (const [index, recipe] of recipes.entries()) {
  if (values.only !== undefined && values.only !== recipe.name) continue;
  console.log(await rowOf(recipe, `run-${index + 1}`));
}

async function rowOf(recipe: Recipe, run: string): Promise<string> {
  const overrides = {
    outputDir: join(dataFolder, run),
    ...(values.steps === undefined ? {} : { maxSteps: values.steps }),
    ...recipe.overrides,
  };
  const flags = Object.entries(overrides).flatMap(([key, value]) => [`--${key}`, String(value)]);
  const train = ['train', join(recipeFolder, `${recipe.name}.yaml`), ...flags, '--json'];

  const [options] = (await qloraNode([...train, '--print-config'])) as unknown as [TrainerOptions];
  const events = await qloraNode([...train, '--overwrite']);
  const first = events.find(({ type }) => type === 'step');
  const evaluated = events.findLast(({ type }) => type === 'eval');
  const result = events.findLast(({ type }) => type === 'result');
  const { before, share } = await measure(options, questions);
  const losses = [first?.loss, before, evaluated?.loss].map((loss) => Number(loss).toFixed(4));
  return `| ${[recipe.name, recipe.change, result?.steps, ...losses, percent(share)].join(' | ')} |`;
}

/** The lines of `qlora-node ... --json`. */
async function qloraNode(args: readonly string[]): Promise<Record<string, unknown>[]> {
  const { stdout } = await promisify(execFile)(process.execPath, [commandLine, ...args], { maxBuffer: 2 ** 26 });
  return stdout
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line));
}

/** The loss of the evaluation rows before training, and the share of questions that the trained adapter answers. */
async function measure(
  options: TrainerOptions,
  questions: readonly Question[],
): Promise<{ before: number; share: number }> {
  // Its own adapter changes nothing yet, and its rows to train on are not needed.
  await using trainer = await QLoRATrainer.create({ ...options, maxTrainSamples: 1 });
  const { loss: before } = await trainer.evaluate();
  await trainer.model.loadLora('trained', options.outputDir);
  return { before, share: accuracy(await ask(trainer.model, questions, { adapter: 'trained' })) };
}
