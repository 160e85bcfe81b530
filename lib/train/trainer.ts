import { join } from 'node:path';
import { z } from 'zod';
import { Tape } from '../autograd.js';
import { lengthOf, type Sequence } from '../data/batch.js';
import { explainRow } from '../data/encode.js';
import type { DatasetSource } from '../data/read-rows.js';
import { MemoryRows, targetsOf } from '../data/row-store.js';
import { type Row, toRow } from '../data/rows.js';
import { DEFAULT_TEMPLATE } from '../data/templates.js';
import { QLoRAError } from '../errors.js';
import { type EventStream, eventStream } from '../event-stream.js';
import { makeFolder } from '../io/folder.js';
import type { LoraAdapter } from '../models/lora-adapter.js';
import { checkOptions } from '../options.js';
import { QuantizedModel } from '../quantized-model.js';
import { type Datasets, encodeDataset, encodeOptionsOf, prepareDatasets } from './dataset.js';
import type { TrainEvent, TrainResult, TrainRun } from './events.js';
import { planRun } from './memory-plan.js';
import {
  checkpointingOf,
  type EnqueuedStep,
  enqueueLoss,
  evalBatches,
  handled,
  microBatches,
  readScalar,
} from './micro-step.js';
import { Optimizer } from './optimizer.js';
import { type ResolvedTrainerOptions, resolveTrainerOptions, type TrainerOptions } from './options.js';
import { adapterName, type MemoryPlan } from './rehearsal.js';
import { StepPlan } from './step-plan.js';

const signalSchema = z.strictObject({ signal: z.instanceof(AbortSignal).optional() });
/** Steps in a row whose gradient may be NaN or infinite before training gives up. */
const mostSkipped = 5;

/** Fine-tunes a model on rows: an adapter over a frozen, usually 4-bit base, or all weights. */
export class QLoRATrainer implements AsyncDisposable {
  readonly model: QuantizedModel;
  /** What is being trained; undefined in full fine-tuning. */
  readonly adapter: LoraAdapter | undefined;
  readonly #options: ResolvedTrainerOptions;
  readonly #datasets: Datasets;
  readonly #plan: StepPlan;
  readonly #optimizer: Optimizer;
  readonly #ownsModel: boolean;
  #step = 0;
  #microStep = 0;
  /** Of the last step that was reported; NaN before the first. */
  #finalLoss = Number.NaN;
  #running: Promise<unknown> | undefined;
  #abort: AbortController | undefined;

  private constructor(
    model: QuantizedModel,
    adapter: LoraAdapter | undefined,
    options: ResolvedTrainerOptions,
    datasets: Datasets,
    plan: StepPlan,
  ) {
    this.model = model;
    this.adapter = adapter;
    this.#options = options;
    this.#datasets = datasets;
    this.#plan = plan;
    this.#ownsModel = typeof options.model === 'string';
    this.#optimizer = new Optimizer(adapter?.parameters ?? [...model.core.weights.dense.values()], options);
    if (adapter) adapter.training = { template: options.template as string };
  }

  /**
   * Loads the model where a folder is given, reads and encodes the data, and makes the adapter.
   *
   * @throws ERR_QLORA_OPTION_UNKNOWN, ERR_QLORA_OPTION_INVALID, ERR_QLORA_DATASET_NOT_FOUND, ERR_QLORA_ROW_INVALID,
   *   ERR_QLORA_NO_TARGETS, and what QuantizedModel.load() throws
   */
  static async create(options: TrainerOptions): Promise<QLoRATrainer> {
    const resolved = resolveTrainerOptions(options);
    const { model: given, quantization, computeDtype, device, lora, initialAdapter } = resolved;
    const full = lora === 'none';
    const planned =
      resolved.maxMemory !== undefined || resolved.gradientCheckpointing === 'auto'
        ? await planRun(resolved, 'fit')
        : undefined;
    if (planned) resolved.gradientCheckpointing = planned.checkpointedLayers;
    const model =
      typeof given === 'string'
        ? await QuantizedModel.loadWith(given, { quantization, computeDtype, device }, full ? 'masters' : 'as-in-file')
        : given;
    // What takes more than was planned is an error then, not the end of the process.
    if (resolved.maxMemory !== undefined && typeof given === 'string')
      model.core.stream.setMemoryLimit(resolved.maxMemory);
    let adapter: LoraAdapter | undefined;
    try {
      if (initialAdapter) adapter = await model.loadLora(adapterName, initialAdapter);
      // What an adapter was trained with it goes on with.
      resolved.template ??= adapter?.training?.template ?? DEFAULT_TEMPLATE;
      const datasets = planned?.datasets ?? (await prepareDatasets(model.core, resolved));
      if (!initialAdapter && !full) adapter = model.addLora(adapterName, { seed: resolved.seed, ...(lora as object) });
      const plan = planned?.steps ?? (await StepPlan.create(datasets.train, resolved));
      return new QLoRATrainer(model, adapter, resolved, datasets, plan);
    } catch (error) {
      if (typeof given === 'string') await model.dispose();
      else if (adapter) model.removeLora(adapterName);
      throw error;
    }
  }

  /**
   * Bytes of memory by class that a run with these options takes at most, before anything is loaded: the steps are gone
   * through without being computed. The data is read and encoded; a source that can be read only once is then used up.
   */
  static async plan(options: TrainerOptions): Promise<MemoryPlan> {
    return (await planRun(resolveTrainerOptions(options), 'any')).memory;
  }

  /** What a row becomes: tokens, which of them are trained, what was cut. */
  async explain(row: Row): Promise<{ tokens: string[]; ids: number[]; trained: boolean[]; truncated: number }> {
    return explainRow(toRow(row, { row: 1 }), this.model.core.tokenizer, encodeOptionsOf(this.#options));
  }

  /** Trains to the end of maxSteps or epochs, and saves into outputDir. */
  train(options: { signal?: AbortSignal } = {}): TrainRun {
    const abort = new AbortController();
    const stop = () => {
      abort.abort();
      return run as Promise<TrainResult>;
    };
    const run: EventStream<TrainEvent, TrainResult> = eventStream(async (emit) => {
      const { signal } = checkOptions(signalSchema, options, 'train');
      const either = signal ? AbortSignal.any([signal, abort.signal]) : abort.signal;
      return this.#exclusive(() => {
        this.#abort = abort;
        return this.#train(emit, either);
      });
    }, stop);
    return Object.assign(run, { stop });
  }

  /** One optimizer step over exactly these rows, in micro-batches of batchSize; the loss is that before the step. */
  trainStep(rows: readonly Row[]): Promise<{ loss: number; gradNorm: number }> {
    return this.#exclusive(async () => {
      const encoding = encodeOptionsOf(this.#options);
      const encoded = new MemoryRows(await encodeDataset(this.model.core, rows, encoding, undefined));
      const plan = await StepPlan.create(encoded, this.#options);
      const step = await this.#enqueueStep(await plan.load(Array.from({ length: plan.sequences.count }, (_, i) => i)));
      if (!step) throw new QLoRAError('ERR_QLORA_INTERNAL', 'a step without a signal was stopped');
      const { loss, gradNorm } = await step.result;
      return { loss, gradNorm };
    });
  }

  /** Mean loss over all target tokens, without dropout. Default: the eval data set. */
  async evaluate(
    dataset?: DatasetSource,
    options: { signal?: AbortSignal } = {},
  ): Promise<{ loss: number; perplexity: number }> {
    const { signal } = checkOptions(signalSchema, options, 'evaluate');
    const { core } = this.model;
    const rows = dataset
      ? new MemoryRows(await encodeDataset(core, dataset, encodeOptionsOf(this.#options), this.#options.datasetFormat))
      : this.#datasets.eval;
    if (!rows) {
      throw new QLoRAError(
        'ERR_QLORA_NO_EVAL_DATASET',
        'evaluate() needs rows: none were given, and the trainer has no evalDataset',
        {
          hint: 'Pass a data set, or create the trainer with evalDataset.',
        },
      );
    }
    const batches = evalBatches(rows, this.#options.batchSize);
    const targets = batches.flat().reduce((n, i) => n + rows.targets(i), 0);
    const pass = { adapter: this.#adapterName, checkpointing: 'none' as const };
    let loss = 0;
    for (const batch of batches) {
      signal?.throwIfAborted();
      const sequences = (await rows.rows(batch)).map((row) => [row]);
      using part = enqueueLoss(core, undefined, sequences, 1 / targets, pass);
      loss += (await part.read())[0] as number;
    }
    return { loss, perplexity: Math.exp(loss) };
  }

  /** Writes the adapter, or after full fine-tuning the model; default into outputDir. Returns where. */
  async save(directory = this.#options.outputDir): Promise<string> {
    if (this.adapter) {
      if (this.#step > 0) await this.#checkTrained(this.adapter);
      await this.adapter.save(directory);
    } else {
      await this.model.save(directory);
    }
    return directory;
  }

  /** Frees the optimizer, and the model where the trainer loaded it. A run under way is stopped first, as stop() does. */
  async dispose(): Promise<void> {
    this.#abort?.abort();
    await this.#running?.catch(() => {});
    this.#optimizer.dispose();
    if (this.#ownsModel) await this.model.dispose();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.dispose();
  }

  get #adapterName(): string | undefined {
    return this.adapter?.name;
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

  async #train(emit: (event: TrainEvent) => void, signal: AbortSignal): Promise<TrainResult> {
    const total = this.#plan.totalSteps;
    const { evalSteps } = this.#options;
    let skipped = 0;
    let since = performance.now();
    // A step's numbers are awaited after the next step was enqueued, so that the stream never runs dry.
    let previous: EnqueuedStep | undefined;
    const report = async () => {
      if (!previous) return;
      const { step, learningRate, result } = previous;
      previous = undefined;
      const { loss, gradNorm, finite, tokens } = await result;
      const now = performance.now();
      const tokensPerSecond = (tokens * 1000) / (now - since);
      since = now;
      this.#finalLoss = loss;
      skipped = finite ? 0 : skipped + 1;
      if (!finite) {
        emit({
          type: 'warning',
          code: 'NON_FINITE_GRADIENT',
          message: `step ${step}: loss ${loss}, gradient norm ${gradNorm}: the step changed nothing`,
        });
        if (skipped >= mostSkipped) {
          throw new QLoRAError(
            'ERR_QLORA_DIVERGED',
            `${mostSkipped} steps in a row had a loss or gradient that is not finite, the last at step ${step}`,
            {
              hint: 'Use a lower learningRate, or computeDtype bf16 instead of f16.',
            },
          );
        }
      }
      const { liveBytes } = this.model.memory();
      const epoch = step / this.#plan.stepsPerEpoch;
      emit({ type: 'step', step, epoch, loss, learningRate, gradNorm, tokensPerSecond, memoryBytes: liveBytes });
    };
    const evaluate = async () => {
      const step = this.#step;
      try {
        emit({ type: 'eval', step, ...(await this.evaluate(undefined, { signal })) });
      } catch (error) {
        if (!signal.aborted) throw error;
      }
      since = performance.now();
    };
    // Where nothing can be saved, that is known before the first step.
    await makeFolder(this.#options.outputDir);

    while (this.#step < total) {
      const rows = await this.#plan.load(await this.#plan.sequencesOf(this.#step));
      const enqueued = await this.#enqueueStep(rows, signal, report);
      if (!enqueued) {
        await report();
        return this.#stopped(emit);
      }
      await report();
      previous = enqueued;
      if (evalSteps && this.#datasets.eval && this.#step % evalSteps === 0 && this.#step < total) {
        await report();
        await evaluate();
      }
    }
    await report();
    if (this.#datasets.eval) await evaluate();
    if (signal.aborted) return this.#stopped(emit);
    const outputDir = await this.save();
    return {
      steps: this.#step,
      finalLoss: this.#finalLoss,
      outputDir,
      ...(this.adapter ? { adapterDir: outputDir } : {}),
      stopped: false,
    };
  }

  /** The last whole step is kept; outputDir itself stays for finished runs. */
  async #stopped(emit: (event: TrainEvent) => void): Promise<TrainResult> {
    const path = join(this.#options.outputDir, `checkpoint-${this.#step}`);
    if (this.adapter) await this.adapter.save(path);
    else await this.model.save(path);
    emit({ type: 'checkpoint', step: this.#step, path });
    return {
      steps: this.#step,
      finalLoss: this.#finalLoss,
      outputDir: path,
      ...(this.adapter ? { adapterDir: path } : {}),
      stopped: true,
    };
  }

  /**
   * Enqueues forward, backward and the optimizer over these sequences. The loss is the sum over all of them divided by their
   * target tokens, so that it does not depend on how they are cut into micro-steps.
   *
   * @returns undefined where the signal stopped it, which leaves the parameters as they were
   */
  async #enqueueStep(
    sequences: readonly Sequence[],
    signal?: AbortSignal,
    between: () => Promise<void> = async () => {},
  ): Promise<EnqueuedStep | undefined> {
    const { batchSize, seed } = this.#options;
    const targets = sequences.flat().reduce((n, row) => n + targetsOf(row), 0);
    const losses: Promise<number>[] = [];
    this.#optimizer.zeroGradients();
    for (const part of microBatches(sequences, lengthOf, batchSize)) {
      if (signal?.aborted) {
        await Promise.allSettled(losses);
        return undefined;
      }
      const pass = {
        adapter: this.#adapterName,
        checkpointing: checkpointingOf(this.#options),
        dropout: { seed, microStep: this.#microStep++ },
      };
      const loss = enqueueLoss(this.model.core, new Tape(), part, 1 / targets, pass);
      losses.push(handled(readScalar(loss)));
      if (losses.length === 1) await between();
      // At most two micro-steps wait in the queue.
      await losses.at(-3);
    }
    await losses.at(-2);
    const learningRate = this.#plan.learningRate(this.#step);
    this.#step++;
    using norm = this.#optimizer.step(this.#step, learningRate);
    const norms = handled(norm.read());
    const tokens = sequences.reduce((n, sequence) => n + lengthOf(sequence), 0);
    const result = (async () => {
      const loss = (await Promise.all(losses)).reduce((a, b) => a + b, 0);
      const [gradNorm, finite] = (await norms) as unknown as [number, number];
      return { loss, gradNorm, finite: finite === 1, tokens };
    })();
    const step = this.#step;
    // A step that failed, for want of memory, changed nothing and does not count.
    result.catch(() => {
      this.#step = step - 1;
    });
    return { step, learningRate, result };
  }

  /** An adapter whose B is all zero learnt nothing: saving it would hide that. */
  async #checkTrained(adapter: LoraAdapter): Promise<void> {
    for (const layer of adapter.layers) {
      if ((await layer.read('B')).some((x) => x !== 0)) return;
    }
    throw new QLoRAError(
      'ERR_QLORA_ADAPTER_UNTRAINED',
      `after ${this.#step} steps every B of the adapter is still zero: it changes nothing`,
      {
        hint: 'Is learningRate 0, or were all steps skipped?',
      },
    );
  }
}
