/** Saves checkpoints of a run, each time failing at a later system call (fail_io.cpp), and goes on from what is left. */
import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { type QLoRAError, QLoRATrainer } from '../../lib/index.js';
import { faultOf } from '../../lib/io/manifest.js';
import { callsSince, disturbed } from './call-log.js';
import { tinyRun } from './tiny-run.js';

export interface CheckpointOutcome {
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

const [outputDir, log] = process.argv.slice(2) as [string, string];
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

const trainer = await QLoRATrainer.create(options);
/** A step, and its checkpoint; or only the latter, where it failed before. */
const saveOnce = async () => {
  for await (const { type } of trainer.train()) if (type === 'checkpoint') break;
};
await saveOnce();
callsSince(log);
await saveOnce();
const { length } = callsSince(log);
const again = await QLoRATrainer.create(options);
const outcomes: CheckpointOutcome[] = [];
for (let call = 0; call < length; call++) {
  const before = newest();
  process.env.FAIL_AT = String(call);
  const error = await saveOnce().then(
    () => undefined,
    ({ name, code, message, hint }: QLoRAError) => ({ name, code, message, hint }),
  );
  delete process.env.FAIL_AT;
  const name = disturbed(log);
  const faults: (string | never[])[] = [];
  for (const step of steps()) faults.push((await faultOf(join(outputDir, `checkpoint-${step}`))) ?? []);
  const outcome = { call, name, error, faults: faults.flat(), newest: newest(), before, temporary: temporary() };
  const { steps: resumed } = await again.train({ resume: true, signal: AbortSignal.abort() });
  outcomes.push({ ...outcome, resumed, left: temporary() });
}
await Promise.all([trainer.dispose(), again.dispose()]);
console.log(JSON.stringify(outcomes));
