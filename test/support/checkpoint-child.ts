/** Saves checkpoints of a run, each time failing at a later system call (fail_under.cpp), and goes on from what is left. */
import { readdirSync, readFileSync, truncateSync } from 'node:fs';
import { join } from 'node:path';
import { type QLoRAError, QLoRATrainer } from '../../lib/index.js';
import { faultOf } from '../../lib/io/manifest.js';
import { tinyRun } from './tiny-run.js';

export interface SaveOutcome {
  call: number;
  /** Its name and its file. */
  name: string;
  error: Pick<QLoRAError, 'name' | 'code' | 'message' | 'hint'> | undefined;
  /** Of checkpoints that are not whole. */
  faults: string[];
  /** Steps of the newest checkpoint, of the one before the save, and of a trainer that resumed. */
  newest: number;
  before: number;
  resumed: number;
  /** What lay about after the failure, and after the next start. */
  temporary: string[];
  left: string[];
}

const [outputDir, log, stride] = process.argv.slice(2) as [string, string, string];
const options = tinyRun(outputDir, {
  maxSteps: 1000,
  saveSteps: 1,
  saveTotalLimit: 1,
  evalSteps: undefined,
  keepBest: false,
  evalDataset: undefined,
});
const steps = () => readdirSync(outputDir).flatMap((name) => /^checkpoint-(\d+)$/.exec(name)?.[1] ?? []);
const newest = () => Math.max(0, ...steps().map(Number));
const temporary = () => readdirSync(outputDir).filter((name) => name.endsWith('tmp'));
/** What was called since it was last asked for. */
const calls = () => {
  const lines = readFileSync(log, 'utf8').trim().split('\n');
  truncateSync(log);
  return lines;
};

const trainer = await QLoRATrainer.create(options);
/** A step, and its checkpoint; or only the latter, where it failed before. */
const saveOnce = async () => {
  for await (const { type } of trainer.train()) if (type === 'checkpoint') break;
};
await saveOnce();
calls();
await saveOnce();
const { length } = calls();
const again = await QLoRATrainer.create(options);
const outcomes: SaveOutcome[] = [];
for (let call = 0; call < length; call += Number(stride)) {
  const before = newest();
  process.env.FAIL_AT = String(call);
  const error = await saveOnce().then(
    () => undefined,
    ({ name, code, message, hint }: QLoRAError) => ({ name, code, message, hint }),
  );
  delete process.env.FAIL_AT;
  const name = calls().find((line) => line.startsWith('disturbed ')) ?? '';
  const faults: (string | never[])[] = [];
  for (const step of steps()) faults.push((await faultOf(join(outputDir, `checkpoint-${step}`))) ?? []);
  const outcome = { call, name, error, faults: faults.flat(), newest: newest(), before, temporary: temporary() };
  const { steps: resumed } = await again.train({ resume: true, signal: AbortSignal.abort() });
  outcomes.push({ ...outcome, resumed, left: temporary() });
}
await Promise.all([trainer.dispose(), again.dispose()]);
console.log(JSON.stringify(outcomes));
