/**
 * A training run in a process of its own, to be killed: every event is a line of a log as soon as it comes, and of
 * standard output. What the run ends with is the last line.
 */
import { appendFileSync } from 'node:fs';
import { type QLoRAError, QLoRATrainer } from '../../lib/index.js';
import { tinyRun } from './tiny-run.js';

const [outputDir, log] = process.argv.slice(2) as [string, string];
const say = (line: object) => {
  appendFileSync(log, `${JSON.stringify(line)}\n`);
  process.stdout.write(`${JSON.stringify(line)}\n`);
};
try {
  await using trainer = await QLoRATrainer.create(tinyRun(outputDir));
  const run = trainer.train({ resume: true });
  for await (const event of run) say(event);
  say({ type: 'result', ...(await run) });
} catch (error) {
  const { name, code, message } = error as QLoRAError;
  say({ type: 'error', name, code, message });
}
