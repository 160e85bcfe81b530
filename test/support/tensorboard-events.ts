/**
 * The event files of test/references/tensorboard: a run that stopped after step 3, and went on from step 2.
 *
 *   node dist/test/support/tensorboard-events.js FOLDER
 */
import { mkdirSync, readdirSync, renameSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { TensorBoardFile } from '../../lib/report/tensorboard.js';

const step = (n: number, loss: number) => ({
  type: 'step' as const,
  step: n,
  epoch: n / 200,
  loss,
  learningRate: 2e-4 / n,
  gradNorm: 0.3 * n,
  tokensPerSecond: 1000 + n,
  memoryBytes: 1e9,
});

const files = {
  'events.out.tfevents.1700000000.reference.1.0': {
    resumeAt: undefined,
    events: [
      step(1, 2.5),
      step(2, 2.25),
      { type: 'eval' as const, step: 2, loss: 2.375, perplexity: 10.75 },
      step(3, 99),
    ],
  },
  'events.out.tfevents.1700000100.reference.2.0': {
    resumeAt: 2,
    events: [step(3, 2), step(300, Number.NaN), { type: 'eval' as const, step: 300, loss: 1.5, perplexity: 4.5 }],
  },
};

/** Writes them; returns their names. */
export async function writeTensorBoardEvents(folder: string): Promise<string[]> {
  for (const [name, { resumeAt, events }] of Object.entries(files)) {
    const single = join(folder, 'single');
    let seconds = Number(name.split('.')[3]);
    const file = new TensorBoardFile(single, { resumeAt, now: () => seconds++ + 0.5 });
    for (const event of events) file.event(event);
    await file.flush();
    await file.close();
    // Host and process stand in the name.
    renameSync(join(single, readdirSync(single)[0] as string), join(folder, name));
    rmSync(single, { recursive: true });
  }
  return Object.keys(files);
}

const [program, folder] = process.argv.slice(1);
if (program === fileURLToPath(import.meta.url) && folder) {
  mkdirSync(folder, { recursive: true });
  await writeTensorBoardEvents(folder);
}
