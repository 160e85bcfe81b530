/** What a run leaves to look at: metrics.jsonl, report.html, and event files of TensorBoard where asked for. */
import { rename } from 'node:fs/promises';
import { basename, join, relative, resolve } from 'node:path';
import type { QLoRAError } from '../errors.js';
import { writeFileAtomic } from '../io/atomic-file.js';
import { log } from '../logger.js';
import type { TrainEvent, TrainResult } from '../train/events.js';
import { AppendFile } from './append-file.js';
import { type Assets, loadAssets, renderPage } from './page.js';
import { metricsFile, type RunContext, type RunLine, RunLog, type RunSample, readRunLines } from './run-log.js';
import { runPage } from './run-page.js';
import { TensorBoardFile } from './tensorboard.js';

const reportFile = 'report.html';
/** Least milliseconds between two writings of the page. */
const pageInterval = 5000;

export interface RecorderOptions {
  /** The step that the run goes on from: what the log has of later ones is dropped. Left out: it begins anew. */
  resumeAt?: number;
  /** The checkpoint of that step, which may have been written by a process that was killed before it could log it. */
  checkpoint?: string;
  /** Where a run that is resumed is over already: an end that the log has there stays. Default: its last step. */
  endsAt?: number;
  /** Told once, where something could not be written: that never ends a run. */
  onWarning?(warning: { code: string; message: string }): void;
}

/**
 * Takes what happens in a run and writes it in the background. No method of it waits but `flush` and `close`, and none
 * throws.
 */
export class RunRecorder {
  /** Where it writes. */
  readonly folder: string;
  readonly #log: RunLog;
  readonly #metrics: AppendFile;
  readonly #tensorBoard: TensorBoardFile | undefined;
  readonly #isLogged: (step: number) => boolean;
  readonly #onWarning: RecorderOptions['onWarning'];
  /** The last step, where it is not in the file. */
  #unwritten: StepLine | undefined;
  #assets: Assets | undefined;
  #warned = false;
  #page: Promise<void> = Promise.resolve();
  #pageDue = 0;
  #pageBusy = false;

  private constructor(
    folder: string,
    context: RunContext,
    options: RecorderOptions,
    metrics: AppendFile,
    { known, unwritten }: Pick<Earlier, 'known' | 'unwritten'>,
  ) {
    this.folder = folder;
    this.#log = known;
    this.#unwritten = unwritten;
    this.#metrics = metrics;
    this.#onWarning = options.onWarning;
    this.#isLogged = loggedSteps(context);
    if (context.options.reportTo === 'tensorboard') {
      const runs = join(folder, 'runs', basename(resolve(folder)));
      this.#tensorBoard = new TensorBoardFile(runs, { resumeAt: options.resumeAt });
    }
  }

  /** The folder must be there. */
  static async open(folder: string, context: RunContext, options: RecorderOptions = {}): Promise<RunRecorder> {
    const { resumeAt } = options;
    const path = join(folder, metricsFile);
    const none: Earlier = { text: '', known: new RunLog(folder) };
    const { endsAt = context.totalSteps } = options;
    const earlier = resumeAt === undefined ? none : await earlierLines(folder, { resumeAt, endsAt }, context);
    const { text, damage, known } = earlier;
    const recorder = new RunRecorder(folder, context, options, new AppendFile(path, Buffer.byteLength(text)), earlier);
    await recorder.#attempt(async () => {
      if (damage) await rename(path, `${path}.damaged`);
      if (text) await writeFileAtomic(path, text);
      recorder.#assets = await loadAssets();
      if (damage) throw damage;
    });
    if (!known.start) recorder.#add({ type: 'start', ...context });
    const { checkpoint } = options;
    if (checkpoint && resumeAt !== undefined && !known.checkpoints.some(({ step }) => step === resumeAt)) {
      recorder.#add({ type: 'checkpoint', step: resumeAt, path: relative(folder, checkpoint) });
    }
    recorder.#write();
    await recorder.#page;
    return recorder;
  }

  event(event: TrainEvent): void {
    const { lastStep } = this.#log;
    if (event.type === 'step') {
      const line = stamped(event) as StepLine;
      this.#log.add(line);
      this.#unwritten = line;
      if (this.#isLogged(event.step)) this.#writeStep();
    } else if (event.type === 'checkpoint') {
      this.#add({ ...event, path: relative(this.folder, event.path) });
    } else if (event.type === 'warning') {
      // A warning is about the step whose numbers come next.
      this.#add({ ...event, step: (lastStep?.step ?? 0) + 1 });
    } else {
      this.#add(event);
      this.#tensorBoard?.event(event);
    }
    this.#write();
  }

  /** What the model answered after an evaluation. */
  sample(sample: RunSample): void {
    this.#add({ type: 'sample', ...sample });
  }

  /** @param peakMemoryBytes the most that the model and its training had at one time */
  finish({ steps, finalLoss, stopped }: TrainResult, peakMemoryBytes: number): void {
    // Of a run that was finished before, and did nothing since, the end is there.
    if (this.#log.end) return;
    const status = stopped ? 'stopped' : 'finished';
    this.#writeStep();
    this.#add({ type: 'end', status, step: steps, finalLoss, peakMemoryBytes });
  }

  /** The run ended with an error. */
  fail(error: unknown): void {
    this.#writeStep();
    this.#add({ type: 'end', status: 'failed', step: this.#log.lastStep?.step ?? 0, error: String(error) });
  }

  /** Everything until now is in metrics.jsonl once this resolves. Call it before a checkpoint is written. */
  async flush(): Promise<void> {
    await this.#attempt(() => this.#metrics.flush());
    await this.#attempt(async () => this.#tensorBoard?.flush());
  }

  /** Writes what is left, and the page as it stays. */
  async close(): Promise<void> {
    await this.flush();
    this.#pageBusy = true;
    await this.#page;
    await this.#attempt(() => this.#writePage());
    await this.#attempt(() => this.#metrics.close());
    await this.#attempt(async () => this.#tensorBoard?.close());
  }

  /** To the log that the page shows, and to the file. */
  #add(line: DistributiveOmit<RunLine, 'time'>): void {
    const whole = stamped(line);
    this.#log.add(whole);
    this.#metrics.add(`${JSON.stringify(whole)}\n`);
  }

  /** The last step to the files, where it is not there yet. */
  #writeStep(): void {
    const line = this.#unwritten;
    if (!line) return;
    this.#unwritten = undefined;
    this.#metrics.add(`${JSON.stringify(line)}\n`);
    this.#tensorBoard?.event(line);
  }

  #write(): void {
    this.flush();
    if (this.#pageBusy || performance.now() < this.#pageDue) return;
    this.#pageBusy = true;
    this.#page = this.#attempt(() => this.#writePage()).then(() => {
      this.#pageDue = performance.now() + pageInterval;
      this.#pageBusy = false;
    });
  }

  async #writePage(): Promise<void> {
    if (!this.#assets) return;
    await writeFileAtomic(join(this.folder, reportFile), renderPage(runPage(this.#log), this.#assets));
  }

  /** What fails is told once and changes nothing else. */
  async #attempt(work: () => Promise<void>): Promise<void> {
    try {
      await work();
    } catch (error) {
      if (this.#warned) return;
      this.#warned = true;
      const message = `the run's log or report could not be written, training goes on: ${(error as Error).message}`;
      log('warn', message, { cause: error });
      this.#onWarning?.({ code: 'REPORT_NOT_WRITTEN', message });
    }
  }
}

type StepLine = Extract<RunLine, { type: 'step' }>;
type DistributiveOmit<T, K extends PropertyKey> = T extends unknown ? Omit<T, K> : never;

function stamped(line: DistributiveOmit<RunLine, 'time'>): RunLine {
  const { type, ...rest } = line;
  return { type, ...rest, time: new Date().toISOString() } as RunLine;
}

/** The first step, the last, and each `loggingSteps`. */
function loggedSteps({ options, totalSteps }: RunContext): (step: number) => boolean {
  const every = Number(options.loggingSteps ?? 10);
  return (step) => step === 1 || step === totalSteps || step % every === 0;
}

interface Earlier {
  /** Lines for the file. */
  text: string;
  known: RunLog;
  /** A step that was only written since it was the last then. */
  unwritten?: StepLine;
  /** Why the lines behind these could not be read. */
  damage?: QLoRAError;
}

/** The lines up to a step. Its end is left out where the run goes on. */
async function earlierLines(
  folder: string,
  { resumeAt, endsAt }: { resumeAt: number; endsAt: number },
  context: RunContext,
): Promise<Earlier> {
  const isLogged = loggedSteps(context);
  const known = new RunLog(folder);
  const kept: string[] = [];
  let before: RunLine | undefined;
  const earlier = (more: Partial<Earlier>): Earlier => ({ text: kept.join(''), known, ...more });
  let unwritten: StepLine | undefined;
  try {
    for await (const line of readRunLines(folder)) {
      if (line.type !== 'start' && line.step > resumeAt) continue;
      if (line.type === 'end') {
        const isWhole = line.status === 'finished' && line.step === endsAt;
        if (!isWhole && before?.type === 'step' && !isLogged(before.step)) {
          kept.pop();
          unwritten = before;
        }
        if (!isWhole) continue;
      }
      before = line;
      known.add(line);
      kept.push(`${JSON.stringify(line)}\n`);
    }
  } catch (error) {
    const damage = error as QLoRAError;
    if (damage.code !== 'ERR_QLORA_RUN_NOT_FOUND') return earlier({ damage });
  }
  return earlier({ unwritten });
}
