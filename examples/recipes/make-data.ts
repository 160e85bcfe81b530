/**
 * Writes the rows of the recipes: subtractions, which the demo's model has never seen, among rows of its old skills.
 *
 *   node dist/examples/recipes/make-data.js
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { promptTemplate } from '../../lib/data/templates.js';
import { type DemoData, makeData } from '../demo/data.js';
import type { Question } from '../demo/old-skills.js';

/** Where the recipes' files expect it, from the package's folder. */
export const dataFolder = join('demo-output', 'recipes');

/** Rows for 300 steps of 16, each once. */
const options = { seed: 1, heldOut: 100, oldSkills: 60, rows: 300 * 16, rehearsal: 0.4 };

/** The words that the demo's model knows. */
const { source, tail } = promptTemplate('alpaca');

/** What a question is in the files of a suffix. */
const rowOf: Readonly<Record<string, (question: Question) => object>> = {
  '': ({ instruction, input, output }) => ({ instruction, input, output }),
  '-text': (question) => ({ text: `${source(question)}${tail}${question.output}` }),
};

/** The same questions as instructions, and as texts; nothing of eval*.jsonl is in train*.jsonl. */
export function writeData(): DemoData {
  const data = makeData(options);
  const asked = [...data.subtractions, ...data.oldSkills];
  mkdirSync(dataFolder, { recursive: true });
  for (const [suffix, toRow] of Object.entries(rowOf)) {
    writeLines(`train${suffix}.jsonl`, data.training.map(toRow));
    writeLines(`eval${suffix}.jsonl`, asked.map(toRow));
  }
  return data;
}

function writeLines(name: string, rows: readonly object[]): void {
  writeFileSync(join(dataFolder, name), rows.map((row) => `${JSON.stringify(row)}\n`).join(''));
}

if (import.meta.url === pathToFileURL(process.argv[1] as string).href) {
  const { training } = writeData();
  console.log(`${training.length} rows to train on are in ${dataFolder}`);
}
