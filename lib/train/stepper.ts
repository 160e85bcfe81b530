import { Tape } from '../autograd.js';
import { lengthOf, type Sequence } from '../data/batch.js';
import { targetsOf } from '../data/row-store.js';
import type { ModelCore } from '../models/core.js';
import type { DecoderPass } from '../models/decoder.js';
import { scale } from '../ops/elementwise.js';
import type { Tensor } from '../tensor.js';
import { checkpointingOf, type EnqueuedStep, enqueueLoss, handled, microBatches, readScalar } from './micro-step.js';
import type { Optimizer } from './optimizer.js';
import type { ResolvedTrainerOptions } from './options.js';
import type { StepPlan } from './step-plan.js';

/** Enqueues steps, and counts them. */
export class Stepper {
  /** Steps enqueued, and micro-steps, which key dropout and noise. */
  step = 0;
  microStep = 0;

  constructor(
    readonly core: ModelCore,
    /** undefined where the weights themselves are trained. */
    readonly adapterName: string | undefined,
    /** What is trained. */
    readonly parameters: readonly Tensor[],
    readonly optimizer: Optimizer,
    readonly plan: StepPlan,
    readonly options: ResolvedTrainerOptions,
  ) {}

  /**
   * Enqueues forward, backward and the optimizer over these sequences. The loss is the sum over all of them divided by their
   * target tokens, so that it does not depend on how they are cut into micro-steps.
   *
   * @param between runs while the first micro-step is computed
   * @returns undefined where the signal stopped it, which leaves parameters and counts as they were
   */
  async enqueue(
    sequences: readonly Sequence[],
    signal?: AbortSignal,
    between: () => Promise<void> = async () => {},
  ): Promise<EnqueuedStep | undefined> {
    const { core, optimizer } = this;
    const before = { step: this.step, microStep: this.microStep };
    const targets = sequences.flat().reduce((n, row) => n + targetsOf(row), 0);
    const losses: Promise<number>[] = [];
    const checks: Tensor[] = [];
    optimizer.zeroGradients();
    try {
      for (const part of this.microBatches(sequences)) {
        if (signal?.aborted) {
          await Promise.allSettled(losses);
          this.microStep = before.microStep;
          return undefined;
        }
        const pass = this.passOf(this.microStep++);
        const loss = enqueueLoss(core, new Tape(), part, 1 / targets, pass, optimizer.lossScale);
        // 0, or NaN where the loss is not finite: the gradient may be finite all the same.
        checks.push(scale(undefined, loss, 0));
        losses.push(handled(readScalar(loss)));
        if (losses.length === 1) await between();
        // At most two micro-steps wait in the queue.
        await losses.at(-3);
      }
      await losses.at(-2);
      const learningRate = this.plan.learningRate(this.step);
      this.step++;
      using outcome = optimizer.step(learningRate, checks);
      const outcomes = handled(outcome.read());
      const tokens = sequences.reduce((n, sequence) => n + lengthOf(sequence), 0);
      const result = (async () => {
        const loss = (await Promise.all(losses)).reduce((a, b) => a + b, 0);
        const [gradNorm, applied, lossScale] = (await outcomes) as unknown as [number, number, number];
        return { loss, gradNorm, finite: applied === 1, lossScale, tokens };
      })();
      // A step that failed, for want of memory, changed nothing and does not count.
      result.catch(() => {
        if (this.step > before.step) Object.assign(this, before);
      });
      return { step: this.step, firstMicroStep: before.microStep, sequences, learningRate, result };
    } catch (error) {
      // Not if the step before has failed meanwhile, and set the counts back further.
      if (this.step === before.step) this.microStep = before.microStep;
      throw error;
    } finally {
      for (const check of checks) check.dispose();
    }
  }

  microBatches(sequences: readonly Sequence[]): Sequence[][] {
    return microBatches(sequences, lengthOf, this.options.batchSize);
  }

  passOf(microStep: number): Omit<DecoderPass, 'computeDtype'> {
    const { seed, neftuneNoiseAlpha: alpha, activationOffloading } = this.options;
    return {
      adapter: this.adapterName,
      checkpointing: checkpointingOf(this.options),
      keptInputs: activationOffloading && this.core.stream.device !== 'cpu' ? 'host' : 'device',
      dropout: { seed, microStep },
      neftune: alpha > 0 ? { alpha, seed, microStep } : undefined,
    };
  }
}
