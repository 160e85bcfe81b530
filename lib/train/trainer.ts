import { z } from 'zod';
import { explainRow } from '../data/explain.js';
import type { Preflight } from '../data/preflight.js';
import type { DatasetSource } from '../data/read-rows.js';
import { type Row, toRow } from '../data/rows.js';
import { templateOf, trainingRecord } from '../data/templates.js';
import { QLoRAError } from '../errors.js';
import { type EventStream, eventStream } from '../event-stream.js';
import { mannersOf } from '../generate/manners.js';
import type { LoraAdapter } from '../models/lora-adapter.js';
import { restoreModel, writeModel } from '../models/save.js';
import { checkOptions } from '../options.js';
import { QuantizedModel } from '../quantized-model.js';
import { type Datasets, encodeDataset, encodeOptionsOf, encodeRows, prepareDatasets } from './dataset.js';
import { checkEarly } from './early-checks.js';
import { type Evaluation, evaluateRows } from './evaluate.js';
import type { TrainEvent, TrainResult, TrainRun } from './events.js';
import { warnOfIdle } from './idle-options.js';
import { Optimizer } from './optimizer.js';
import { type ResolvedTrainerOptions, resolveTrainerOptions, type TrainerOptions } from './options.js';
import { needsPlan, planRun } from './planned-run.js';
import { adapterName, type MemoryPlan } from './rehearsal.js';
import { type Progress, Run, type Trainee } from './run.js';
import { asSequences, StepPlan } from './step-plan.js';
import { Stepper } from './stepper.js';
import { Turns } from './turns.js';

const signalSchema = z.strictObject({ signal: z.instanceof(AbortSignal).optional() });
const trainSchema = signalSchema.extend({ resume: z.union([z.boolean(), z.string().min(1)]).optional() });

/** Fine-tunes a model on rows: an adapter over a frozen, usually 4-bit base, or all weights. */
export class QLoRATrainer implements AsyncDisposable {
  readonly model: QuantizedModel;
  /** What is being trained; undefined in full fine-tuning. */
  readonly adapter: LoraAdapter | undefined;
  /** What the data set is like: rows, tokens, what is cut, what comes twice, what teaches nothing. */
  readonly preflight: Preflight;
  readonly #options: ResolvedTrainerOptions;
  readonly #datasets: Datasets;
  /** undefined where nothing demanded one. */
  readonly #memoryPlan: MemoryPlan | undefined;
  readonly #stepper: Stepper;
  readonly #progress: Progress;
  readonly #turns = new Turns();
  readonly #ownsModel: boolean;
  #running: Promise<unknown> | undefined;
  #abort: AbortController | undefined;

  private constructor(
    model: QuantizedModel,
    adapter: LoraAdapter | undefined,
    options: ResolvedTrainerOptions,
    datasets: Datasets,
    plan: StepPlan,
    optimizer: Optimizer,
    memoryPlan: MemoryPlan | undefined,
  ) {
    this.model = model;
    this.adapter = adapter;
    this.#options = options;
    this.#datasets = datasets;
    this.preflight = datasets.preflight;
    this.#memoryPlan = memoryPlan;
    this.#ownsModel = typeof options.model === 'string';
    const parameters = adapter?.parameters ?? [...model.core.weights.dense.values()];
    this.#stepper = new Stepper(model.core, adapter?.name, parameters, optimizer, plan, options);
    this.#progress = { loss: Number.NaN, skipped: 0, run: undefined, saved: undefined };
    (adapter ?? model.core).training = trainingRecord(options.template);
  }

  /**
   * Loads the model where a folder is given, reads and encodes the data, and makes the adapter.
   *
   * @throws ERR_QLORA_OPTION_UNKNOWN, ERR_QLORA_OPTION_INVALID, ERR_QLORA_DATASET_NOT_FOUND, ERR_QLORA_ROW_INVALID,
   *   ERR_QLORA_NO_TARGETS, and what QuantizedModel.load() throws
   */
  static async create(options: TrainerOptions): Promise<QLoRATrainer> {
    const resolved = resolveTrainerOptions(options);
    warnOfIdle(resolved);
    await checkEarly(resolved);
    const { model: given, quantization, computeDtype, device, offline, revision, lora, initialAdapter } = resolved;
    const load = { quantization, computeDtype, device, offline, revision };
    const full = lora === 'none';
    const planned = needsPlan(resolved) ? await planRun(resolved, 'fit') : undefined;
    if (planned) resolved.gradientCheckpointing = planned.checkpointedLayers;
    let model: QuantizedModel | undefined;
    let adapter: LoraAdapter | undefined;
    let datasets = planned?.datasets;
    try {
      model =
        typeof given === 'string' ? await QuantizedModel.loadWith(given, load, full ? 'masters' : 'as-in-file') : given;
      // What takes more than was planned is an error then, not the end of the process.
      if (typeof given === 'string') model.core.stream.setMemoryLimit(resolved.maxMemory ?? 0);
      if (initialAdapter) adapter = await model.loadLora(adapterName, initialAdapter);
      // What an adapter, or a model that one was merged into, was trained with it goes on with.
      resolved.template ??= templateOf((adapter ?? model.core).training);
      datasets ??= await prepareDatasets(model.core, resolved);
      if (!initialAdapter && !full) adapter = model.addLora(adapterName, { seed: resolved.seed, ...(lora as object) });
      const plan = planned?.steps ?? (await StepPlan.create(datasets.train, resolved));
      const trained = adapter?.namedParameters ?? model.core.weights.dense;
      const setting = {
        totalSteps: plan.totalSteps,
        computeDtype: model.core.computeDtype,
        paging: planned?.paging && { ...planned.paging, directory: resolved.outputDir },
      };
      const optimizer = await Optimizer.create(trained, resolved, setting);
      return new QLoRATrainer(model, adapter, resolved, datasets, plan, optimizer, planned?.memory);
    } catch (error) {
      await datasets?.close();
      if (typeof given === 'string') await model?.dispose();
      else if (adapter) given.removeLora(adapterName);
      throw error;
    }
  }

  /**
   * Bytes of memory by class that a run with these options takes at most, before anything is loaded: the steps are gone
   * through without being computed. The data is read and encoded; a source that can be read only once is then used up.
   */
  static async plan(options: TrainerOptions): Promise<MemoryPlan> {
    const { memory, datasets } = await planRun(resolveTrainerOptions(options), 'any');
    await datasets.close();
    return memory;
  }

  /** What a row becomes: tokens, which of them are trained, what was cut. */
  async explain(row: Row): Promise<{ tokens: string[]; ids: number[]; trained: boolean[]; truncated: number }> {
    return explainRow(toRow(row, { row: 1 }), this.model.core.tokenizer, encodeOptionsOf(this.#options));
  }

  /**
   * Trains to the end of maxSteps or epochs, or until earlyStoppingPatience ends it, and saves into outputDir.
   * `resume: true` goes on from the newest whole checkpoint in outputDir, and starts anew where there is none; a string
   * names a checkpoint. A finished run that is resumed trains nothing and resolves with the same.
   *
   * @throws ERR_QLORA_CHECKPOINT_INVALID, ERR_QLORA_CHECKPOINT_MISMATCH, ERR_QLORA_DISK_FULL, ERR_QLORA_WRITE_FAILED,
   *   ERR_QLORA_DIVERGED, ERR_QLORA_BUSY
   */
  train(options: { signal?: AbortSignal; resume?: boolean | string } = {}): TrainRun {
    const abort = new AbortController();
    const stop = () => {
      abort.abort();
      return run as Promise<TrainResult>;
    };
    const run: EventStream<TrainEvent, TrainResult> = eventStream(async (emit) => {
      const { signal, resume = false } = checkOptions(trainSchema, options, 'train');
      const either = signal ? AbortSignal.any([signal, abort.signal]) : abort.signal;
      return this.#exclusive(() => {
        this.#abort = abort;
        return new Run(this.#trainee, emit, either).train(resume);
      });
    }, stop);
    return Object.assign(run, { stop });
  }

  /** One optimizer step over exactly these rows, in micro-batches of batchSize; the loss is that before the step. */
  trainStep(rows: readonly Row[]): Promise<{ loss: number; gradNorm: number }> {
    return this.#exclusive(async () => {
      const encoding = encodeOptionsOf(this.#options);
      const encoded = await encodeRows(this.model.core, rows, encoding);
      const sequences = await asSequences(encoded, this.#options);
      const step = await this.#turns.take(() => this.#stepper.enqueue(sequences));
      if (!step) throw new QLoRAError('ERR_QLORA_INTERNAL', 'a step without a signal was stopped');
      const { loss, gradNorm } = await step.result;
      return { loss, gradNorm };
    });
  }

  /** Mean loss over all target tokens, without dropout. Default: the eval data set. During a run it waits for a step's end. */
  async evaluate(dataset?: DatasetSource, options: { signal?: AbortSignal } = {}): Promise<Evaluation> {
    const { signal } = checkOptions(signalSchema, options, 'evaluate');
    const { core } = this.model;
    const encoding = encodeOptionsOf(this.#options);
    await using given = dataset ? await encodeDataset(core, dataset, encoding, this.#options.datasetFormat) : undefined;
    const rows = given ? given.rows : this.#datasets.eval;
    if (!rows) {
      throw new QLoRAError(
        'ERR_QLORA_NO_EVAL_DATASET',
        'evaluate() needs rows: none were given, and the trainer has no evalDataset',
        {
          hint: 'Pass a data set, or create the trainer with evalDataset.',
        },
      );
    }
    const { batchSize } = this.#options;
    // Awaited here, since the rows that were given go with this call.
    return await this.#turns.take(() => evaluateRows(core, this.adapter?.name, rows, batchSize, signal));
  }

  /**
   * Writes the adapter, or after full fine-tuning the model; default into outputDir. Returns where. During a run it waits
   * for a step's end.
   */
  save(directory = this.#options.outputDir): Promise<string> {
    return this.#turns.take(async () => {
      if (this.adapter) {
        if (this.#stepper.step > 0) await this.#checkTrained(this.adapter);
        await this.adapter.save(directory);
      } else {
        await this.model.save(directory);
      }
      return directory;
    });
  }

  /** Frees the optimizer, and the model where the trainer loaded it. A run under way is stopped first, as stop() does. */
  async dispose(): Promise<void> {
    this.#abort?.abort();
    await this.#running?.catch(() => {});
    // What waits for a turn, as evaluate(), still has its.
    await this.#turns.take(async () => {});
    this.#stepper.optimizer.dispose();
    await this.#datasets.close();
    if (this.#ownsModel) await this.model.dispose();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.dispose();
  }

  get #trainee(): Trainee {
    const { core } = this.model;
    const whole = {
      write: (folder: string) => writeModel(core, folder, mannersOf(core, undefined)),
      restore: (folder: string) => restoreModel(core, folder),
    };
    return {
      stepper: this.#stepper,
      model: this.model,
      adapter: this.adapter,
      trained: this.adapter ?? whole,
      datasets: this.#datasets,
      memoryPlan: this.#memoryPlan,
      turns: this.#turns,
      save: () => this.save(),
      progress: this.#progress,
    };
  }

  async #exclusive<T>(work: () => Promise<T>): Promise<T> {
    if (this.#running) {
      throw new QLoRAError('ERR_QLORA_BUSY', 'this trainer is training already', { hint: 'Await the run before it.' });
    }
    const running = work();
    this.#running = running;
    try {
      return await running;
    } finally {
      this.#running = undefined;
      this.#abort = undefined;
    }
  }

  /** An adapter whose B is all zero learnt nothing: saving it would hide that. */
  async #checkTrained(adapter: LoraAdapter): Promise<void> {
    for (const layer of adapter.layers) {
      if ((await layer.read('B')).some((x) => x !== 0)) return;
    }
    throw new QLoRAError(
      'ERR_QLORA_ADAPTER_UNTRAINED',
      `after ${this.#stepper.step} steps every B of the adapter is still zero: it changes nothing`,
      {
        hint: 'Is learningRate 0, or were all steps skipped?',
      },
    );
  }
}
