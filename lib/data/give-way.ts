import { setImmediate } from 'node:timers/promises';

/** Work between two turns of the event loop, in milliseconds. */
const slice = 5;

/** For long loops: a function to be awaited in each round, which gives way to the event loop every few milliseconds. */
export function givingWay(): () => Promise<void> | undefined {
  let since = performance.now();
  return () => {
    if (performance.now() - since < slice) return undefined;
    return setImmediate().then(() => {
      since = performance.now();
    });
  };
}
