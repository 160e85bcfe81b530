/** What is known of a run: the lines of its metrics.jsonl, one JSON object each, gathered for those who draw it. */
import { createReadStream } from 'node:fs';
import { basename, join, resolve } from 'node:path';
import { createInterface } from 'node:readline';
import type { Preflight } from '../data/preflight.js';
import { QLoRAError } from '../errors.js';
import type { TrainEvent } from '../train/events.js';
import type { MemoryPlan } from '../train/rehearsal.js';
import { Curve } from './curve.js';

export const metricsFile = 'metrics.jsonl';

/** Of the run as a whole; all of it plain JSON. */
export interface RunContext {
  /** As the trainer resolved them, defaults filled in; rows of the program as a phrase. */
  options: Readonly<Record<string, unknown>>;
  totalSteps: number;
  model: { name: string; device: string; sizeBytes: number; trainableParameters: number };
  /** Bytes by class with their `total`, as planned before anything was loaded. */
  memoryPlan?: Readonly<MemoryPlan>;
  /** What was seen in the data before the first step. */
  preflight?: Preflight;
}

/** What the model answered after an evaluation. */
export interface RunSample {
  step: number;
  prompt: string;
  /** The answer that the row has. */
  expected?: string;
  text: string;
}

/** How it ended. A run that lacks this line goes on, or was killed. */
export interface RunEnd {
  status: 'finished' | 'stopped' | 'failed';
  step: number;
  /** Of the last step; null where it is not finite. */
  finalLoss?: number | null;
  /** Most bytes that the model and its training had at one time. */
  peakMemoryBytes?: number;
  error?: string;
}

export type Warning = Extract<TrainEvent, { type: 'warning' }> & { step: number };
export type RunLine = { time: string } & (
  | ({ type: 'start' } & RunContext)
  | Exclude<TrainEvent, { type: 'warning' }>
  | Warning
  | ({ type: 'sample' } & RunSample)
  | ({ type: 'end' } & RunEnd)
);
type LineOf<Type extends RunLine['type']> = Extract<RunLine, { type: Type }>;

export class RunLog {
  /** The folder's name. */
  readonly name: string;
  readonly curve = new Curve();
  readonly evals: LineOf<'eval'>[] = [];
  readonly checkpoints: LineOf<'checkpoint'>[] = [];
  readonly warnings: LineOf<'warning'>[] = [];
  readonly samples: LineOf<'sample'>[] = [];
  start: LineOf<'start'> | undefined;
  firstStep: LineOf<'step'> | undefined;
  lastStep: LineOf<'step'> | undefined;
  end: LineOf<'end'> | undefined;

  constructor(folder: string) {
    this.name = basename(resolve(folder));
  }

  add(line: RunLine): void {
    const at: { [Type in RunLine['type']]: (line: LineOf<Type>) => unknown } = {
      start: (start) => {
        this.start = start;
      },
      step: (step) => {
        this.firstStep ??= step;
        this.lastStep = step;
        this.curve.push(step);
      },
      eval: (e) => this.evals.push(e),
      checkpoint: (c) => this.checkpoints.push(c),
      warning: (w) => this.warnings.push(w),
      sample: (s) => this.samples.push(s),
      end: (end) => {
        this.end = end;
      },
    };
    (at[line.type] as (line: RunLine) => unknown)(line);
  }

  get bestEval(): LineOf<'eval'> | undefined {
    return this.evals.reduce<LineOf<'eval'> | undefined>((a, b) => (a && a.loss <= b.loss ? a : b), undefined);
  }
}

/**
 * The lines of a run's metrics.jsonl, in their order. A last line that a killed process left unfinished is left out.
 *
 * @throws ERR_QLORA_RUN_NOT_FOUND where the folder has no such file, ERR_QLORA_RUN_INVALID where a line is none of a run
 */
export async function* readRunLines(folder: string): AsyncGenerator<RunLine> {
  const path = join(folder, metricsFile);
  let number = 0;
  let torn: QLoRAError | undefined;
  try {
    for await (const text of createInterface({ input: createReadStream(path), crlfDelay: Number.POSITIVE_INFINITY })) {
      number++;
      if (torn) throw torn;
      const line = parsed(text);
      if (line) yield line;
      else {
        torn = new QLoRAError('ERR_QLORA_RUN_INVALID', `${path}: line ${number} is no line of a training run`, {
          hint: 'Was the file edited, or cut? Remove the line, or the file to start its log anew.',
        });
      }
    }
  } catch (cause) {
    const { code, message } = cause as NodeJS.ErrnoException;
    if (cause instanceof QLoRAError) throw cause;
    throw new QLoRAError('ERR_QLORA_RUN_NOT_FOUND', `${path}: cannot be read: ${message}`, {
      hint: code === 'ENOENT' ? 'Name the outputDir of a training run.' : 'Check the path and the permissions.',
      cause,
    });
  }
}

export async function readRun(folder: string): Promise<RunLog> {
  const log = new RunLog(folder);
  for await (const line of readRunLines(folder)) log.add(line);
  return log;
}

const types = new Set<unknown>(['start', 'step', 'eval', 'checkpoint', 'warning', 'sample', 'end']);

function parsed(text: string): RunLine | undefined {
  try {
    const line = JSON.parse(text);
    return types.has(line?.type) ? line : undefined;
  } catch {
    return undefined;
  }
}
