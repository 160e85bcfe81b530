/**
 * The conformance tests' `t`: tap's on the CPU; on a device (`npm run test:cuda`), where there may be no packages, the
 * part of it that they use. There a test that needs an operation which the device does not have yet is skipped.
 */

import loose from 'node:assert';
import assert from 'node:assert/strict';
import type { Test } from 'tap';
import type { Device } from '../../lib/tensor.js';

export type { Test } from 'tap';

/** What the tests run on. */
export const testDevice = (process.env.QLORA_TEST_DEVICE ?? 'cpu') as Device;

export interface Outcome {
  passed: number;
  failures: string[];
  /** How many tests, by reason. */
  skipped: Map<string, number>;
  /** The test that runs, and since when. */
  running?: { path: string; since: number };
}

type Body = (t: Test) => unknown;

/** What an error says of an operation that the device does not have yet; also where a process that was started had it. */
const lackedOperation = (error: unknown) =>
  /\S+ does not have the operation \w+ yet/.exec((error as Error)?.message ?? '')?.[0];

/** As tap's match: a pattern, or an object of patterns. */
function matches(actual: unknown, pattern: unknown): boolean {
  if (pattern instanceof RegExp) return pattern.test(String(actual));
  if (typeof pattern !== 'object' || pattern === null) return Object.is(actual, pattern);
  return Object.entries(pattern).every(([key, p]) => matches((actual as Record<string, unknown>)?.[key], p));
}

function sameAs(actual: unknown, expected: unknown): boolean {
  try {
    loose.deepEqual(actual, expected);
    return true;
  } catch {
    return false;
  }
}

class DeviceTest {
  #queue: Promise<void> = Promise.resolve();
  readonly #ends: (() => unknown)[] = [];

  constructor(
    readonly path: string,
    readonly outcome: Outcome,
  ) {}

  /** Runs after the tests that were given before. */
  test(name: string, ...rest: [Body] | [{ skip?: unknown }, Body]): Promise<void> {
    const [options, body] = rest.length === 1 ? [{}, rest[0]] : rest;
    const path = this.path ? `${this.path} > ${name}` : name;
    this.#queue = this.#queue.then(async () => {
      if (options.skip) return this.#skip(String(options.skip));
      const child = new DeviceTest(path, this.outcome);
      const before = this.outcome.running;
      this.outcome.running = { path, since: performance.now() };
      try {
        await body(child as unknown as Test);
        await child.finish();
      } catch (error) {
        const lacked = lackedOperation(error);
        if (lacked) this.#skip(lacked);
        else child.fail(error instanceof Error ? (error.stack ?? error.message) : String(error));
      } finally {
        this.outcome.running = before && { ...before, since: performance.now() };
      }
    });
    return this.#queue;
  }

  async finish(): Promise<void> {
    await this.#queue;
    for (const end of this.#ends.splice(0)) await end();
  }

  #skip(reason: string): void {
    this.outcome.skipped.set(reason, (this.outcome.skipped.get(reason) ?? 0) + 1);
  }

  #check(holds: boolean, message: unknown, detail?: () => string): boolean {
    if (holds) this.outcome.passed++;
    else this.outcome.failures.push(`${this.path}: ${message ?? 'failed'}${detail ? `: ${detail()}` : ''}`);
    return holds;
  }

  ok(value: unknown, message?: string) {
    return this.#check(Boolean(value), message);
  }
  notOk(value: unknown, message?: string) {
    return this.#check(!value, message);
  }
  pass(message?: string) {
    return this.#check(true, message);
  }
  fail(message?: string) {
    return this.#check(false, message);
  }
  equal(actual: unknown, expected: unknown, message?: string) {
    return this.#check(Object.is(actual, expected), message, () => `expected ${expected}, got ${actual}`);
  }
  same(actual: unknown, expected: unknown, message?: string) {
    return this.#check(sameAs(actual, expected), message, () => {
      try {
        assert.deepEqual(actual, expected);
        return '';
      } catch (error) {
        return (error as Error).message.slice(0, 2000);
      }
    });
  }
  notSame(actual: unknown, expected: unknown, message?: string) {
    return this.#check(!sameAs(actual, expected), message);
  }
  match(actual: unknown, pattern: unknown, message?: string) {
    return this.#check(matches(actual, pattern), message, () => `${actual} does not match ${pattern}`);
  }
  notMatch(actual: unknown, pattern: unknown, message?: string) {
    return this.#check(!matches(actual, pattern), message);
  }

  #thrown(error: unknown, pattern: unknown, message?: string) {
    const lacked = lackedOperation(error);
    if (lacked) {
      this.#skip(lacked);
      return true;
    }
    return this.#check(matches(error, pattern ?? {}), message, () => `threw ${(error as Error)?.stack ?? error}`);
  }
  throws(call: () => unknown, pattern?: unknown, message?: string) {
    try {
      call();
    } catch (error) {
      return this.#thrown(error, pattern, message);
    }
    return this.#check(false, message, () => 'nothing was thrown');
  }
  async rejects(call: Promise<unknown> | (() => Promise<unknown>), pattern?: unknown, message?: string) {
    try {
      await (typeof call === 'function' ? call() : call);
    } catch (error) {
      return this.#thrown(error, pattern, message);
    }
    return this.#check(false, message, () => 'it did not reject');
  }

  teardown(end: () => unknown): void {
    this.#ends.unshift(end);
  }
  comment(): void {}
}

/** Of all that ran so far. */
export const outcome: Outcome = { passed: 0, failures: [], skipped: new Map() };
const root = new DeviceTest('', outcome);
/** Resolves when every test that was given has run. */
export const finished = () => root.finish();

const t: Test = testDevice === 'cpu' ? (await import('tap')).default : (root as unknown as Test);
export default t;
