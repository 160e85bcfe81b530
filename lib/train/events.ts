import type { EventStream } from '../event-stream.js';

export type TrainEvent =
  /** One an optimizer step. */
  | {
      type: 'step';
      step: number;
      epoch: number;
      loss: number;
      learningRate: number;
      gradNorm: number;
      tokensPerSecond: number;
      memoryBytes: number;
    }
  | { type: 'eval'; step: number; loss: number; perplexity: number }
  | { type: 'checkpoint'; step: number; path: string }
  | { type: 'warning'; code: string; message: string };

/** outputDir is a PEFT adapter or, after full fine-tuning, a model folder; adapterDir is set for the former. */
export interface TrainResult {
  steps: number;
  finalLoss: number;
  outputDir: string;
  adapterDir?: string;
  stopped: boolean;
}

/**
 * Await it for the result, iterate it for events. Leaving the loop, `stop()` and an aborted signal all drop the step in
 * progress, save the last whole one as a checkpoint and resolve with `stopped: true`.
 */
export interface TrainRun extends EventStream<TrainEvent, TrainResult> {
  stop(): Promise<TrainResult>;
}
