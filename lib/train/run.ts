/** One run of a trainer: steps, evaluations, checkpoints, and where it goes on from. */
import { resolve } from 'node:path';
import type { RowStore } from '../data/row-store.js';
import { QLoRAError } from '../errors.js';
import { removeLeftovers } from '../io/atomic-folder.js';
import { makeFolder } from '../io/folder.js';
import { log } from '../logger.js';
import type { LoraAdapter } from '../models/lora-adapter.js';
import type { QuantizedModel } from '../quantized-model.js';
import { RunRecorder } from '../report/run-recorder.js';
import {
  type Checkpoint,
  checkpointPath,
  newestCheckpoint,
  nextRun,
  openCheckpoint,
  removeOldCheckpoints,
  restoreCheckpoint,
  type Trained,
  type TrainerState,
  writeCheckpoint,
} from './checkpoint.js';
import type { Datasets } from './dataset.js';
import { firstBadPart } from './diverged.js';
import { evaluateRows } from './evaluate.js';
import type { TrainEvent, TrainResult } from './events.js';
import { differences, rowsHash, type Settings, settingsOf } from './fingerprint.js';
import type { EnqueuedStep } from './micro-step.js';
import { answers, contextOf } from './record.js';
import type { MemoryPlan } from './rehearsal.js';
import type { Stepper } from './stepper.js';
import type { Turns } from './turns.js';

/** Steps in a row whose loss or gradient may be NaN or infinite before training gives up. */
const mostSkipped = 5;

/** What a trainer's runs share. */
export interface Trainee {
  stepper: Stepper;
  model: QuantizedModel;
  adapter: LoraAdapter | undefined;
  trained: Trained;
  datasets: Datasets;
  memoryPlan: MemoryPlan | undefined;
  /** Calls from outside run between steps. */
  turns: Turns;
  /** Writes the result into outputDir. */
  save(): Promise<string>;
  progress: Progress;
}

/** Where training stands, beside the stepper's counts. A later run of the same trainer goes on from here. */
export type Progress = Pick<TrainerState, 'evaluated' | 'best' | 'skipped'> & {
  /** Of the last step that was reported; NaN before the first. */
  loss: number;
  /** undefined before the first run. */
  run: number | undefined;
  /** The step of the last checkpoint. */
  saved: number | undefined;
};

export class Run {
  readonly #t: Trainee;
  readonly #tell: (event: TrainEvent) => void;
  readonly #signal: AbortSignal;
  #recorder: RunRecorder | undefined;
  /** Told before there was a recorder. */
  readonly #early: TrainEvent[] = [];
  #settings: Settings | undefined;
  #evalRows: string | undefined;
  /** When the step that is being computed began, in milliseconds. */
  #since = performance.now();
  /** A step's numbers are awaited after the next step was enqueued, so that the stream never runs dry. */
  #previous: EnqueuedStep | undefined;

  constructor(trainee: Trainee, emit: (event: TrainEvent) => void, signal: AbortSignal) {
    this.#t = trainee;
    this.#tell = emit;
    this.#signal = signal;
  }

  /** Trains to the end, or until the signal. */
  async train(resume: boolean | string): Promise<TrainResult> {
    const { stepper, progress } = this.#t;
    const { outputDir } = stepper.options;
    // Where nothing can be saved, that is known before the first step.
    await makeFolder(outputDir);
    await removeLeftovers(outputDir);
    if (resume !== false) await this.#resume(resume);
    const goesOn = progress.run !== undefined || progress.saved === stepper.step;
    if (goesOn && this.#over) {
      log(
        'info',
        `the run is finished (${stepper.step} of ${stepper.plan.totalSteps} steps): nothing is left to train`,
      );
    }
    progress.run ??= await nextRun(outputDir);
    const recorder = await this.#record(goesOn ? stepper.step : undefined);
    try {
      const result = await this.#steps();
      recorder.finish(result, stepper.core.stream.memory().peakBytes);
      return result;
    } catch (error) {
      recorder.fail(error);
      throw error;
    } finally {
      await recorder.close();
    }
  }

  async #steps(): Promise<TrainResult> {
    const { stepper, progress } = this.#t;
    this.#since = performance.now();
    while (!this.#signal.aborted) {
      if (await this.#boundary()) return this.#finish();
      const rows = await stepper.plan.rowsOf(stepper.step);
      const step = await this.#t.turns.take(() => stepper.enqueue(rows, this.#signal, () => this.#report()));
      if (!step) break;
      await this.#report();
      this.#previous = step;
      // After one that was skipped the next may be the last: nothing is enqueued behind it.
      if (progress.skipped > 0) await this.#report();
    }
    return this.#stopped();
  }

  #emit(event: TrainEvent): void {
    if (this.#recorder) this.#recorder.event(event);
    else this.#early.push(event);
    this.#tell(event);
  }

  /** @param resumeAt the step that it goes on from, where the log in outputDir is of this run */
  async #record(resumeAt: number | undefined): Promise<RunRecorder> {
    const onWarning = (warning: { code: string; message: string }) => this.#emit({ type: 'warning', ...warning });
    const saved = resumeAt !== undefined && this.#t.progress.saved === resumeAt;
    const options = {
      resumeAt,
      onWarning,
      // Where early stopping ended it, the log has its end as well.
      ...(this.#over ? { endsAt: this.#t.stepper.step } : {}),
      ...(saved ? { checkpoint: checkpointPath(this.#outputDir, resumeAt) } : {}),
    };
    const recorder = await RunRecorder.open(this.#outputDir, contextOf(this.#t), options);
    for (const event of this.#early) recorder.event(event);
    this.#recorder = recorder;
    return recorder;
  }

  get #outputDir(): string {
    return this.#t.stepper.options.outputDir;
  }

  /** What is due between two steps. @returns whether training is at its end */
  async #boundary(): Promise<boolean> {
    const { stepper, datasets, progress } = this.#t;
    const { evalSteps, saveSteps, keepBest } = stepper.options;
    const { step } = stepper;
    const last = step >= stepper.plan.totalSteps;
    const evaluates = datasets.eval && (last || (evalSteps && step > 0 && step % evalSteps === 0));
    const saves = step > 0 && step % saveSteps === 0;
    if (evaluates || saves || last) await this.#report();
    if (evaluates && progress.evaluated !== step) await this.#evaluate();
    if (this.#signal.aborted) return false;
    const isBest = keepBest && evaluates && progress.best?.step === step;
    const over = this.#over;
    // The end has a checkpoint too: a run that is resumed behind it finds nothing to do.
    const ends = over && step > 0;
    if ((saves || isBest || ends) && progress.saved !== step) await this.#save();
    return over;
  }

  /** Whether all steps are made, or early stopping ended it. */
  get #over(): boolean {
    const { stepper, progress } = this.#t;
    const { earlyStoppingPatience: patience } = stepper.options;
    const patient = patience === undefined || (progress.best?.since ?? 0) < patience;
    return stepper.step >= stepper.plan.totalSteps || !patient;
  }

  /** Takes in the numbers of the step before. */
  async #report(): Promise<void> {
    const enqueued = this.#previous;
    if (!enqueued) return;
    this.#previous = undefined;
    const { stepper, progress } = this.#t;
    const { step, learningRate } = enqueued;
    const { loss, gradNorm, finite, tokens, lossScale } = await enqueued.result;
    const now = performance.now();
    const tokensPerSecond = (tokens * 1000) / (now - this.#since);
    this.#since = now;
    progress.loss = loss;
    // A scale that was too large is no fault of the run: it has been halved, until it is 1.
    const overflowed = !finite && lossScale > 1 && Number.isFinite(loss);
    if (!overflowed) progress.skipped = finite ? 0 : progress.skipped + 1;
    if (overflowed) {
      const what = `a gradient overflowed f16 with the loss scaled by ${lossScale}`;
      const message = `step ${step}: ${what}: the step changed nothing, and the scale is ${lossScale / 2} now`;
      this.#emit({ type: 'warning', code: 'LOSS_SCALE', message });
    } else if (!finite) {
      const message = `step ${step}: loss ${loss}, gradient norm ${gradNorm}: the step changed nothing`;
      this.#emit({ type: 'warning', code: 'NON_FINITE_GRADIENT', message });
    }
    const memoryBytes = stepper.core.stream.memory().liveBytes;
    const epoch = step / stepper.plan.stepsPerEpoch;
    this.#emit({ type: 'step', step, epoch, loss, learningRate, gradNorm, tokensPerSecond, memoryBytes });
    if (progress.skipped >= mostSkipped) throw await this.#diverged(enqueued);
  }

  async #diverged(step: EnqueuedStep): Promise<QLoRAError> {
    const { stepper, adapter } = this.#t;
    const part = await firstBadPart(stepper, adapter, step);
    return new QLoRAError(
      'ERR_QLORA_DIVERGED',
      `${mostSkipped} steps in a row had a loss or gradient that is not finite, the last at step ${step.step}` +
        (part === undefined ? '' : `; the first part of the model that is not finite is ${part}`),
      {
        hint: 'Use a lower learningRate, or computeDtype bf16 instead of f16.',
        detail: { step: step.step, ...(part === undefined ? {} : { module: part }) },
      },
    );
  }

  async #evaluate(): Promise<void> {
    const { stepper, datasets, progress } = this.#t;
    const { core, adapterName, options, step } = stepper;
    if (!datasets.eval) return;
    try {
      const result = await evaluateRows(core, adapterName, datasets.eval, options.batchSize, this.#signal);
      const { best } = progress;
      progress.evaluated = step;
      if (best && !(result.loss < best.loss)) progress.best = { ...best, since: best.since + 1 };
      else if (Number.isFinite(result.loss)) progress.best = { step, loss: result.loss, since: 0 };
      this.#emit({ type: 'eval', step, ...result });
      await this.#ask(datasets.eval);
    } catch (error) {
      if (!this.#signal.aborted) throw error;
    }
    this.#since = performance.now();
  }

  /** What the model says now is recorded to be read; that it cannot answer is no reason to end. */
  async #ask(rows: RowStore): Promise<void> {
    try {
      for await (const answer of answers(this.#t, rows, this.#signal)) this.#recorder?.sample(answer);
    } catch (error) {
      if (this.#signal.aborted) return;
      this.#emit({
        type: 'warning',
        code: 'NO_SAMPLES',
        message: `the model could not answer: ${(error as Error).message}`,
      });
    }
  }

  /** Writes a checkpoint of this step; then older ones may go. */
  async #save(): Promise<string> {
    const { stepper, trained, progress } = this.#t;
    const state = await this.#state();
    // Its log is written before it, so that a run that goes on from it has the whole.
    await this.#recorder?.flush();
    const path = await writeCheckpoint(this.#outputDir, trained, stepper.optimizer, state);
    progress.saved = state.step;
    this.#emit({ type: 'checkpoint', step: state.step, path });
    await removeOldCheckpoints(this.#outputDir, state, stepper.options.saveTotalLimit);
    this.#since = performance.now();
    return path;
  }

  async #state(): Promise<TrainerState> {
    const { stepper, progress } = this.#t;
    const { step, microStep, core, plan } = stepper;
    const { loss, run = 0, skipped, evaluated, best } = progress;
    return {
      version: 1,
      run,
      step,
      microStep,
      totalSteps: plan.totalSteps,
      loss: Number.isFinite(loss) ? loss : null,
      skipped,
      evaluated,
      best,
      instructionSet: core.stream.instructionSet,
      settings: await this.#ownSettings(),
      evalRows: await this.#ownEvalRows(),
    };
  }

  async #ownSettings(): Promise<Settings> {
    const { stepper, adapter, datasets } = this.#t;
    const { core, options } = stepper;
    this.#settings ??= await settingsOf({ core, adapter, options, rows: datasets.train });
    return this.#settings;
  }

  async #ownEvalRows(): Promise<string | undefined> {
    const { datasets } = this.#t;
    if (datasets.eval) this.#evalRows ??= await rowsHash(datasets.eval);
    return this.#evalRows;
  }

  async #resume(resume: true | string): Promise<void> {
    const warn = (code: string) => (message: string) => this.#emit({ type: 'warning', code, message });
    const checkpoint =
      resume === true
        ? await newestCheckpoint(this.#outputDir, warn('CHECKPOINT_DAMAGED'))
        : await openCheckpoint(resume);
    if (!checkpoint) return;
    await this.#checkAgrees(checkpoint);
    const { path, state } = checkpoint;
    const { stepper, trained, progress } = this.#t;
    const { instructionSet } = stepper.core.stream;
    if (state.instructionSet !== instructionSet) {
      warn('INSTRUCTION_SET')(
        `${path} was computed with ${state.instructionSet}, this process uses ${instructionSet}: from here on the bits differ from those of an undisturbed run`,
      );
    }
    await this.#t.turns.take(() => restoreCheckpoint(path, trained, stepper.optimizer));
    const { step, microStep, loss, skipped } = state;
    Object.assign(stepper, { step, microStep });
    Object.assign(progress, { loss: loss ?? Number.NaN, skipped });
    const isHere = resolve(path) === resolve(checkpointPath(this.#outputDir, step));
    progress.saved = isHere ? step : undefined;
    // One that was named may have newer ones beside it. Of another folder, the best lies there too.
    progress.run = resume === true ? state.run : undefined;
    const { evaluated, best } = isHere ? state : { evaluated: undefined, best: undefined };
    Object.assign(progress, { evaluated, best: best && (await this.#isKept(best.step)) ? best : undefined });
  }

  /** A best step of a run that did not keep it cannot be what this one ends with. */
  async #isKept(step: number): Promise<boolean> {
    if (!this.#t.stepper.options.keepBest) return true;
    return this.#isWhole(checkpointPath(this.#outputDir, step), 'keepBest looks among the steps from here on');
  }

  /** Whether the best step's checkpoint can be taken; if not, an event says what is done instead. */
  async #isWhole(path: string, instead: string): Promise<boolean> {
    try {
      await openCheckpoint(path);
      return true;
    } catch (error) {
      this.#emit({ type: 'warning', code: 'BEST_NOT_KEPT', message: `${instead}: ${(error as Error).message}` });
      return false;
    }
  }

  /** @throws ERR_QLORA_CHECKPOINT_MISMATCH where the run would not go on as it began */
  async #checkAgrees({ path, state }: Checkpoint): Promise<void> {
    const { plan, options } = this.#t.stepper;
    const { totalSteps, settings } = state;
    const found = differences(await this.#ownSettings(), settings);
    const comparesLosses = options.keepBest || options.earlyStoppingPatience !== undefined;
    if (comparesLosses && state.best) {
      found.push(...differences({ evalDataset: await this.#ownEvalRows() }, { evalDataset: state.evalRows }));
    }
    if (totalSteps !== plan.totalSteps) {
      // Another number of steps is no matter where the steps so far had the same rates, as with a constant one.
      const steps = Array.from({ length: state.step }, (_, i) => i);
      const sameRates = steps.every((i) => plan.learningRate(i) === plan.learningRate(i, totalSteps));
      if (!sameRates || options.optimizer === 'ademamix') {
        found.push(
          `the number of steps ${plan.totalSteps} (it was ${totalSteps}), on which ${options.lrScheduler} rates depend`,
        );
      }
    }
    if (found.length === 0) return;
    throw new QLoRAError('ERR_QLORA_CHECKPOINT_MISMATCH', `${path} is of another run: ${found.join('; ')}`, {
      hint: 'Resume with the options, the model and the data that the run began with, or train into another outputDir.',
      detail: { path, differences: found },
    });
  }

  async #finish(): Promise<TrainResult> {
    const { stepper, trained, progress, turns, save } = this.#t;
    const { step, options } = stepper;
    if (options.keepBest && progress.best && progress.best.step !== step) {
      const path = checkpointPath(this.#outputDir, progress.best.step);
      if (await this.#isWhole(path, 'the run ends with its last step')) await turns.take(() => trained.restore(path));
    }
    return this.#result(await save(), false);
  }

  /** The last whole step is kept; outputDir itself stays for finished runs. */
  async #stopped(): Promise<TrainResult> {
    const { stepper, progress } = this.#t;
    await this.#report();
    const saved = progress.saved === stepper.step;
    return this.#result(saved ? checkpointPath(this.#outputDir, stepper.step) : await this.#save(), true);
  }

  #result(outputDir: string, stopped: boolean): TrainResult {
    const { stepper, adapter, progress } = this.#t;
    const adapterDir = adapter ? { adapterDir: outputDir } : {};
    return { steps: stepper.step, finalLoss: progress.loss, outputDir, ...adapterDir, stopped };
  }
}
