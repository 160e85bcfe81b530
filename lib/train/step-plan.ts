import type { EncodedRow } from '../data/encode.js';
import { lengthGroupedOrder, shuffledOrder } from '../data/order.js';
import { MemoryRows, type RowStore } from '../data/row-store.js';
import { oneRowEach, packRows, type Sequences } from '../data/sequences.js';
import type { ResolvedTrainerOptions } from './options.js';
import { learningRateAt } from './schedule.js';

/** Most tokens of a sequence that rows are packed into: as many as a row may have. */
export function packedLength({ maxLength, sourceMaxLength, targetMaxLength }: ResolvedTrainerOptions): number {
  return maxLength ?? (sourceMaxLength ?? 1024) + (targetMaxLength ?? 256);
}

/** The sequences that rows form under the options. */
export function sequencesOf(rows: RowStore, options: ResolvedTrainerOptions): Promise<Sequences> | Sequences {
  return options.packing ? packRows(rows, packedLength(options), options.seed) : oneRowEach(rows);
}

/** Rows from the program as the sequences that they form. */
export async function asSequences(
  rows: readonly EncodedRow[],
  options: ResolvedTrainerOptions,
): Promise<EncodedRow[][]> {
  const plan = await StepPlan.create(new MemoryRows(rows), options);
  return plan.load([...Array(plan.sequences.count).keys()]);
}

/** What each step trains on and at which rate: a function of options, rows and the step's number alone. Steps count from 0. */
export class StepPlan {
  /** An epoch's last step may be short. */
  readonly stepsPerEpoch: number;
  readonly totalSteps: number;
  #order: { epoch: number; order: Uint32Array } | undefined;

  private constructor(
    private readonly rows: RowStore,
    readonly sequences: Sequences,
    private readonly options: ResolvedTrainerOptions,
  ) {
    const { maxSteps, epochs } = options;
    this.stepsPerEpoch = Math.ceil(sequences.count / this.#size);
    const ofEpochs = Math.ceil((epochs ?? 3) * this.stepsPerEpoch);
    this.totalSteps =
      maxSteps === undefined ? ofEpochs : epochs === undefined ? maxSteps : Math.min(maxSteps, ofEpochs);
  }

  static async create(rows: RowStore, options: ResolvedTrainerOptions): Promise<StepPlan> {
    return new StepPlan(rows, await sequencesOf(rows, options), options);
  }

  /** Sequences a step. */
  get #size(): number {
    return this.options.batchSize * this.options.gradientAccumulationSteps;
  }

  /** The numbers of the step's sequences. Each epoch goes through all of them in an order of its own. */
  async sequencesOf(step: number): Promise<Uint32Array> {
    const epoch = Math.floor(step / this.stepsPerEpoch);
    if (this.#order?.epoch !== epoch) {
      const { groupByLength, seed } = this.options;
      const order = groupByLength
        ? await lengthGroupedOrder(this.sequences.tokens, this.#size, seed, epoch)
        : shuffledOrder(this.sequences.count, seed, epoch);
      this.#order = { epoch, order };
    }
    const begin = (step % this.stepsPerEpoch) * this.#size;
    return this.#order.order.subarray(begin, begin + this.#size);
  }

  /** The step's rows, sequence by sequence. */
  async rowsOf(step: number): Promise<EncodedRow[][]> {
    return this.load(await this.sequencesOf(step));
  }

  /** The rows of these sequences, sequence by sequence. */
  async load(sequences: ArrayLike<number>): Promise<EncodedRow[][]> {
    const numbers = Array.from(sequences, (i) => this.sequences.rowsOf(i));
    const rows = await this.rows.rows(numbers.flatMap((ofOne) => [...ofOne]));
    let taken = 0;
    return numbers.map(({ length }) => {
      taken += length;
      return rows.slice(taken - length, taken);
    });
  }

  learningRate(step: number, totalSteps = this.totalSteps): number {
    const { lrScheduler, learningRate, warmupRatio, schedulerOptions } = this.options;
    const warmupSteps = this.options.warmupSteps ?? Math.ceil(warmupRatio * totalSteps);
    return learningRateAt(lrScheduler, learningRate, step, { ...schedulerOptions, warmupSteps, totalSteps });
  }
}
