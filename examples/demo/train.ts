import { thousands } from '../../lib/format.js';
import type { QLoRATrainer, TrainEvent, TrainResult } from '../../lib/index.js';
import { percent } from '../../lib/report/format.js';
import type { DemoData } from './data.js';
import { accuracy, ask } from './measure.js';
import { progress } from './progress.js';

export type StepEvent = Extract<TrainEvent, { type: 'step' }>;

export interface TrainingLog {
  result: TrainResult;
  steps: StepEvent[];
  /** Shares of right answers to a few questions, asked while training went on. */
  checks: { step: number; subtraction: number; oldSkills: number }[];
  seconds: number;
  tokensPerSecond: number;
}

export interface TrainDemoOptions {
  totalSteps: number;
  /** Questions of either sort a check, and checks in all. */
  check: { questions: number; times: number };
  signal: AbortSignal;
}

/** Trains, shows how far it is, and asks a few held-out questions meanwhile: training does not wait for the answers. */
export async function train(
  trainer: QLoRATrainer,
  { subtractions, oldSkills }: DemoData,
  { totalSteps, check, signal }: TrainDemoOptions,
): Promise<TrainingLog> {
  const asked = [subtractions.slice(0, check.questions), spread(oldSkills, check.questions)] as const;
  const every = Math.round(totalSteps / (check.times + 1));
  const start = performance.now();
  const steps: StepEvent[] = [];
  const checks: TrainingLog['checks'] = [];
  const pending: Promise<void>[] = [];
  const measure = async (step: number) => {
    const answers = asked.map((questions) => ask(trainer.model, questions, { adapter: adapterOf(trainer), signal }));
    const [subtraction, kept] = (await Promise.all(answers)).map(accuracy) as [number, number];
    checks.push({ step, subtraction, oldSkills: kept });
  };

  const bar = progress('training     ', totalSteps);
  try {
    const run = trainer.train({ signal });
    for await (const event of run) {
      if (event.type === 'warning') console.warn(`  ${event.code}: ${event.message}`);
      if (event.type !== 'step') continue;
      steps.push(event);
      bar.update(event.step, note(event, checks.at(-1)?.subtraction));
      if (event.step % every === 0 && pending.length < check.times) {
        const measured = measure(event.step);
        // Awaited below; a failure before that must not count as unhandled.
        measured.catch(() => {});
        pending.push(measured);
      }
    }
    const result = await run;
    const seconds = (performance.now() - start) / 1000;
    if (!result.stopped) await Promise.all(pending);
    return { result, steps, checks, seconds, tokensPerSecond: meanSpeed(steps) };
  } finally {
    bar.stop();
  }
}

function adapterOf(trainer: QLoRATrainer): string | null {
  return trainer.adapter?.name ?? null;
}

function note({ loss, tokensPerSecond }: StepEvent, subtraction: number | undefined): string {
  const known = subtraction === undefined ? '' : `  subtraction ${percent(subtraction)}`;
  return `loss ${loss.toFixed(3)}${known}  ${thousands(tokensPerSecond)} tokens/s`;
}

/** Some of a list, evenly from all of it. */
function spread<T>(list: readonly T[], count: number): T[] {
  return Array.from({ length: count }, (_, i) => list[Math.floor((i * list.length) / count)] as T);
}

/** All steps have about as many tokens, so the times they took are as the inverse of their speeds. */
function meanSpeed(steps: readonly StepEvent[]): number {
  return steps.length / steps.reduce((sum, { tokensPerSecond }) => sum + 1 / tokensPerSecond, 0);
}
