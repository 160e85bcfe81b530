import type { EncodedRow } from '../data/encode.js';
import { shuffledOrder } from '../data/order.js';
import type { RowStore } from '../data/row-store.js';
import type { ResolvedTrainerOptions } from './options.js';
import { learningRateAt } from './schedule.js';

/** What each step trains on and at which rate: a function of options, rows and the step's number alone. Steps count from 0. */
export class StepPlan {
  /** An epoch's last step may be short. */
  readonly stepsPerEpoch: number;
  readonly totalSteps: number;
  readonly #rows: RowStore;
  readonly #options: ResolvedTrainerOptions;
  #order: { epoch: number; order: Uint32Array } | undefined;

  constructor(rows: RowStore, options: ResolvedTrainerOptions) {
    const { batchSize, gradientAccumulationSteps, maxSteps, epochs } = options;
    this.#rows = rows;
    this.#options = options;
    this.stepsPerEpoch = Math.ceil(rows.count / (batchSize * gradientAccumulationSteps));
    const ofEpochs = Math.ceil((epochs ?? 3) * this.stepsPerEpoch);
    this.totalSteps =
      maxSteps === undefined ? ofEpochs : epochs === undefined ? maxSteps : Math.min(maxSteps, ofEpochs);
  }

  /** Each epoch goes through the rows in an order of its own. */
  rowsOf(step: number): Promise<EncodedRow[]> {
    const { batchSize, gradientAccumulationSteps, seed } = this.#options;
    const size = batchSize * gradientAccumulationSteps;
    const epoch = Math.floor(step / this.stepsPerEpoch);
    if (this.#order?.epoch !== epoch) this.#order = { epoch, order: shuffledOrder(this.#rows.count, seed, epoch) };
    const begin = (step % this.stepsPerEpoch) * size;
    return this.#rows.rows(this.#order.order.subarray(begin, begin + size));
  }

  learningRate(step: number, totalSteps = this.totalSteps): number {
    const { lrScheduler, learningRate, warmupRatio, schedulerOptions } = this.#options;
    const warmupSteps = this.#options.warmupSteps ?? Math.ceil(warmupRatio * totalSteps);
    return learningRateAt(lrScheduler, learningRate, step, { ...schedulerOptions, warmupSteps, totalSteps });
  }
}
