/** A promise that can also be iterated: what generate() and train() return. */
import { QLoRAError } from './errors.js';

export interface EventStream<Item, Result> extends Promise<Result>, AsyncIterable<Item> {}

/**
 * Starts `work` at once. Its items can be iterated, from the first, by one reader; its result awaited. Once iterated, a
 * failure is thrown to the reader only. Leaving the loop early calls `onLeave`.
 */
export function eventStream<Item, Result>(
  work: (emit: (item: Item) => void) => Promise<Result>,
  onLeave: () => unknown,
): EventStream<Item, Result> {
  const items: Item[] = [];
  let wake: (() => void) | undefined;
  let finished = false;
  const result = work((item) => {
    items.push(item);
    wake?.();
  }).finally(() => {
    finished = true;
    wake?.();
  });

  async function* read(): AsyncGenerator<Item, void, undefined> {
    let left = true;
    try {
      for (;;) {
        while (items.length > 0) yield items.shift() as Item;
        if (finished) break;
        await new Promise<void>((resolve) => {
          wake = resolve;
        });
        wake = undefined;
      }
      left = false;
      await result;
    } finally {
      if (left) await onLeave();
    }
  }

  let iterated = false;
  const iterate = () => {
    if (iterated) {
      throw new QLoRAError('ERR_QLORA_BUSY', 'it is being iterated, or was: it has one reader', {
        hint: 'Await it for the result.',
      });
    }
    iterated = true;
    // The reader is told of a failure; without this the promise nobody awaits would count as unhandled.
    result.catch(() => {});
    return read();
  };
  return Object.assign(result, { [Symbol.asyncIterator]: iterate });
}
