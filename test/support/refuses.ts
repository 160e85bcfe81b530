import type { Test } from 'tap';
import { memory, type QuantizedModel } from '../../lib/index.js';

export interface Wrong {
  code: string;
  message: RegExp;
  hint?: RegExp;
}

/** A model that the calls go to: what was enqueued before runs before its memory is looked at. */
let inUse: QuantizedModel | undefined;
export function use(model: QuantizedModel | undefined): void {
  inUse = model;
}

async function liveBytes(): Promise<number | undefined> {
  await inUse?.core.stream.sync();
  return memory()[0]?.liveBytes;
}

/** The error is whole, and what was counted before is counted after. */
export async function refuses(
  t: Test,
  what: string,
  call: () => unknown,
  { code, message, hint = /\w/ }: Wrong,
): Promise<void> {
  const before = await liveBytes();
  const error = await Promise.resolve()
    .then(call)
    .catch((e: unknown) => e);
  t.match(error, { name: 'QLoRAError', code, message, hint }, what);
  t.equal(await liveBytes(), before, `${what}: nothing is left in memory`);
}
