/** Runs that are recorded without being trained, and what they leave. */
import { mkdirSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import t from 'tap';
import type { RunContext } from '../../lib/report/run-log.js';
import { type RecorderOptions, RunRecorder } from '../../lib/report/run-recorder.js';
import type { TrainEvent } from '../../lib/train/events.js';

export const root = mkdtempSync(join(tmpdir(), 'qlora-report-'));
t.teardown(() => rmSync(root, { recursive: true }));
let folders = 0;
export function folder(name = `run-${++folders}`): string {
  mkdirSync(join(root, name), { recursive: true });
  return join(root, name);
}

export const hostile = `</script><img src=x onerror="alert('1')"> <!-- $& $1`;
export const context: RunContext = {
  options: { model: 'models/tiny', learningRate: 2e-4, loggingSteps: 2, template: hostile },
  totalSteps: 6,
  model: { name: hostile, device: 'cpu', sizeBytes: 3_400_000, trainableParameters: 12_345 },
  memoryPlan: { weights: 3e6, adapters: 0, optimizer: 0, activations: 1e6, scratch: 0, total: 4e6 },
  preflight: {
    rows: 51_760,
    split: { train: 51_000, eval: 760 },
    tokens: 4_000_000,
    targetTokens: 1_000_000,
    truncatedRows: 8,
    truncatedShare: 0.02,
    truncatedTokens: 77,
    duplicates: { count: 12, rows: [{ source: 'a', row: 9, sameAs: { source: 'b', row: 4 } }] },
    emptyTargets: { count: 1, rows: [{ source: hostile, row: 17 }] },
    longest: [{ source: 'a', row: 3, tokens: 1280 }],
    sources: [
      { name: 'a', used: 1000, total: 75_000, tokens: 3_000_000, weight: 2 },
      { name: 'b', used: 50_760, total: undefined, tokens: 1_000_000, weight: 1 },
    ],
  },
};

export const step = (n: number, loss = 1 / n): TrainEvent => ({
  type: 'step',
  step: n,
  epoch: n / 4,
  loss,
  learningRate: 2e-4,
  gradNorm: 0.5,
  tokensPerSecond: 1000,
  memoryBytes: 3e6,
});

/** Steps `from` to `to`, with an evaluation, a sample and a checkpoint at each third one. */
export function train(recorder: RunRecorder, to: number, from = 1): void {
  for (let n = from; n <= to; n++) {
    if (n === 5) recorder.event({ type: 'warning', code: 'NON_FINITE_GRADIENT', message: hostile });
    recorder.event(step(n, n === 5 ? Number.NaN : 1 / n));
    if (n % 3 !== 0) continue;
    recorder.event({ type: 'eval', step: n, loss: 2 / n, perplexity: Math.exp(2 / n) });
    recorder.sample({ step: n, prompt: `What is 2 minus 1? ${hostile}`, expected: '1', text: n < 6 ? hostile : 'one' });
    recorder.event({ type: 'checkpoint', step: n, path: join(recorder.folder, `checkpoint-${n}`) });
  }
}

export async function run(directory: string, options?: RecorderOptions, more: Partial<RunContext> = {}): Promise<void> {
  const recorder = await RunRecorder.open(directory, { ...context, ...more }, options);
  train(recorder, 6, (options?.resumeAt ?? 0) + 1);
  recorder.finish({ steps: 6, finalLoss: 1 / 6, stopped: false, outputDir: directory }, 3_900_000);
  await recorder.close();
}

export interface Written {
  type: string;
  step?: number;
  [field: string]: unknown;
}

/** The lines of the log, without what differs between two runs of the same options. */
export function lines(directory: string): Written[] {
  const text = readFileSync(join(directory, 'metrics.jsonl'), 'utf8');
  t.ok(text.endsWith('\n'));
  return text
    .trimEnd()
    .split('\n')
    .map((line) => {
      const { time, ...rest } = JSON.parse(line);
      if (!/^\d{4}-\d\d-\d\dT/.test(time)) t.fail(line);
      return rest;
    });
}

export const page = (directory: string) => readFileSync(join(directory, 'report.html'), 'utf8');
export const chartsOf = (html: string) => JSON.parse(html.match(/id="charts">(.*?)<\/script>/s)?.[1] as string);
