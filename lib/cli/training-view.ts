/** A run as it is watched: a progress bar on a terminal, a line a logging step where piped, an object an event for programs. */
import { MultiBar, type SingleBar } from 'cli-progress';
import { bytes, thousands } from '../format.js';
import type { LogLevel } from '../logger.js';
import type { TrainEvent, TrainResult } from '../train/events.js';
import { duration } from './format.js';
import type { Output } from './output.js';

export interface TrainingView {
  log(level: LogLevel, message: string): void;
  event(event: TrainEvent): void;
  result(result: TrainResult): void;
  close(): void;
}

export interface Extent {
  loggingSteps: number;
  maxSteps?: number;
  epochs?: number;
}

type StepEvent = Extract<TrainEvent, { type: 'step' }>;

export function trainingView(output: Output, extent: Extent): TrainingView {
  if (output.json) return objectView(output);
  return output.terminal ? barView(extent) : lineView(output, extent);
}

function objectView(output: Output): TrainingView {
  return {
    log: (level, message) => output.object({ type: 'log', level, message }),
    event: (event) => output.object(event),
    result: (result) => output.object({ type: 'result', ...result }),
    close: () => {},
  };
}

function lineView(output: Output, extent: Extent): TrainingView {
  let last: StepEvent | undefined;
  let shown = 0;
  const clock = timeLeft(extent);
  const show = () => {
    if (!last || shown === last.step) return;
    shown = last.step;
    const { total, left } = clock.of(last);
    output.line(`step ${last.step}/${total}  ${numbersOf(last)}  left ${duration(left)}`);
  };
  return {
    log: (level, message) => output.line(level === 'info' ? message : `${level}: ${message}`),
    event: (event) => {
      if (event.type === 'step') {
        last = event;
        clock.tick(event);
        if (event.step % extent.loggingSteps === 0) show();
      } else output.line(sentence(event));
    },
    result: (result) => {
      show();
      output.line(ending(result));
    },
    close: () => {},
  };
}

function barView(extent: Extent): TrainingView {
  const format = ' {bar} {value}/{total}  {numbers}  left {left}';
  const bars = new MultiBar({ format, barsize: 20, hideCursor: true, stream: process.stdout, fps: 8 });
  let bar: SingleBar | undefined;
  const clock = timeLeft(extent);
  const say = (text: string) => (bar ? bars.log(`${text}\n`) : process.stdout.write(`${text}\n`));
  const close = () => {
    bars.stop();
    bar = undefined;
  };
  return {
    log: (level, message) => say(level === 'info' ? message : `${level}: ${message}`),
    event: (event) => {
      if (event.type !== 'step') {
        say(sentence(event));
        return;
      }
      clock.tick(event);
      const { total, left } = clock.of(event);
      const payload = { numbers: numbersOf(event), left: duration(left) };
      bar ??= bars.create(total, event.step, payload);
      bar.update(event.step, payload);
    },
    result: (result) => {
      close();
      process.stdout.write(`${ending(result)}\n`);
    },
    close,
  };
}

/** How many steps there will be, and how long they take, judged by those that were made. */
function timeLeft({ maxSteps, epochs }: Extent) {
  let first: { step: number; at: number } | undefined;
  return {
    tick({ step }: StepEvent) {
      first ??= { step, at: performance.now() };
    },
    of({ step, epoch }: StepEvent): { total: number; left: number } {
      const ofEpochs = Math.ceil(((epochs ?? 3) * step) / epoch - 1e-6);
      const total = maxSteps === undefined ? ofEpochs : epochs === undefined ? maxSteps : Math.min(maxSteps, ofEpochs);
      const made = first ? step - first.step : 0;
      const seconds = first && made > 0 ? (performance.now() - first.at) / 1000 / made : 0;
      return { total: Math.max(total, step), left: (total - step) * seconds };
    },
  };
}

function numbersOf({ loss, learningRate, tokensPerSecond, memoryBytes }: StepEvent): string {
  return `loss ${loss.toFixed(4)}  lr ${learningRate.toExponential(2)}  ${thousands(tokensPerSecond)} tok/s  ${bytes(memoryBytes)}`;
}

function sentence(event: Exclude<TrainEvent, StepEvent>): string {
  switch (event.type) {
    case 'eval':
      return `step ${event.step}: eval loss ${event.loss.toFixed(4)}, perplexity ${event.perplexity.toFixed(3)}`;
    case 'checkpoint':
      return `step ${event.step}: checkpoint ${event.path}`;
    case 'warning':
      return `warning: ${event.message} (${event.code})`;
  }
}

function ending({ steps, finalLoss, outputDir, stopped }: TrainResult): string {
  const loss = Number.isFinite(finalLoss) ? `, loss ${finalLoss.toFixed(4)}` : '';
  return stopped
    ? `stopped after ${steps} steps${loss}; kept in ${outputDir}`
    : `done: ${steps} steps${loss}; written to ${outputDir}`;
}
