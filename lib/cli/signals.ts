/** Stopping a run from outside: Ctrl-C, SIGTERM, and SIGUSR1 where asked for. */
import { exitCodes } from './exit-codes.js';

export interface Stopper {
  /** From now on the first signal calls `stop`, rather than ending the process. */
  arm(stop: () => void): void;
  /** The name of the signal that asked to stop. */
  readonly signal: NodeJS.Signals | undefined;
  dispose(): void;
}

/**
 * Listens until disposed. Before `arm` there is nothing to keep: Ctrl-C ends the process with 130, another signal with
 * 75, since the run can be begun again by `resume`. A second Ctrl-C ends it at once.
 */
export function listenForStop({ onUsr1 }: { onUsr1: boolean }): Stopper {
  let stop: (() => void) | undefined;
  let signal: NodeJS.Signals | undefined;
  const names: NodeJS.Signals[] = ['SIGINT', 'SIGTERM', ...(onUsr1 ? (['SIGUSR1'] as const) : [])];
  const listener = (name: NodeJS.Signals) => {
    const again = signal !== undefined;
    signal ??= name;
    if (again && name === 'SIGINT') process.exit(exitCodes.interrupted);
    if (again) return;
    if (stop) stop();
    else process.exit(name === 'SIGINT' ? exitCodes.interrupted : exitCodes.stopped);
  };
  for (const name of names) process.on(name, listener);
  return {
    arm(call) {
      stop = call;
    },
    get signal() {
      return signal;
    },
    dispose() {
      for (const name of names) process.off(name, listener);
    },
  };
}
