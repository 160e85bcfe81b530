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
  readonly #loggingSteps: number;
  readonly #onWarning: RecorderOptions['onWarning'];
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
    known: RunLog,
  ) {
    this.folder = folder;
    this.#log = known;
    this.#metrics = metrics;
    this.#onWarning = options.onWarning;
    this.#loggingSteps = Number(context.options.loggingSteps ?? 10);
    if (context.options.reportTo === 'tensorboard') {
      const runs = join(folder, 'runs', basename(resolve(folder)));
      this.#tensorBoard = new TensorBoardFile(runs, { resumeAt: options.resumeAt });
    }
  }

  /** The folder must be there. */
  static async open(folder: string, context: RunContext, options: RecorderOptions = {}): Promise<RunRecorder> {
    const { resumeAt } = options;
    const known = new RunLog(folder);
    const path = join(folder, metricsFile);
    const none = { text: '', damage: undefined };
    const { text, damage } = resumeAt === undefined ? none : await earlierLines(folder, resumeAt, known);
    const recorder = new RunRecorder(folder, context, options, new AppendFile(path, Buffer.byteLength(text)), known);
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
      const logged = event.step % this.#loggingSteps === 0;
      this.#add(event, logged ? 'written' : 'shown');
      if (logged) this.#tensorBoard?.event(event);
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
    const status = stopped ? 'stopped' : 'finished';
    this.#add({ type: 'end', status, step: steps, finalLoss, peakMemoryBytes });
  }

  /** The run ended with an error. */
  fail(error: unknown): void {
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

  /** To the log that the page shows, and unless it is only 'shown', to the file. */
  #add(line: DistributiveOmit<RunLine, 'time'>, to: 'written' | 'shown' = 'written'): void {
    const { type, ...rest } = line;
    const whole = { type, ...rest, time: new Date().toISOString() } as RunLine;
    this.#log.add(whole);
    if (to === 'written') this.#metrics.add(`${JSON.stringify(whole)}\n`);
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

type DistributiveOmit<T, K extends PropertyKey> = T extends unknown ? Omit<T, K> : never;

/**
 * The lines up to a step, as text; `known` is told of them. The run goes on, so its end is left out.
 *
 * @returns damage: why the lines behind these could not be read
 */
async function earlierLines(
  folder: string,
  resumeAt: number,
  known: RunLog,
): Promise<{ text: string; damage: QLoRAError | undefined }> {
  const kept: string[] = [];
  let damage: QLoRAError | undefined;
  try {
    for await (const line of readRunLines(folder)) {
      if (line.type === 'end' || (line.type !== 'start' && line.step > resumeAt)) continue;
      known.add(line);
      kept.push(`${JSON.stringify(line)}\n`);
    }
  } catch (error) {
    if ((error as QLoRAError).code !== 'ERR_QLORA_RUN_NOT_FOUND') damage = error as QLoRAError;
  }
  return { text: kept.join(''), damage };
}
