/** What a trainer does beside its steps: it says which options are idle, and keeps rows until they were evaluated. */
import { join } from 'node:path';
import { setImmediate } from 'node:timers/promises';
import t, { type Test } from 'tap';
import { EncodedRows } from '../../lib/data/encoded-rows.js';
import { QLoRATrainer, setLogger, type TrainerOptions } from '../../lib/index.js';
import { rowOf, tinyRun } from '../support/tiny-run.js';

const rows = [rowOf(1, 9), rowOf(2, 14)];
const plain = { evalDataset: undefined, evalSteps: undefined, keepBest: false, lrScheduler: 'constant' } as const;
const create = (t: Test, options: Partial<TrainerOptions> = {}) =>
  QLoRATrainer.create(tinyRun(join(t.testdirName, 'out'), { ...plain, ...options }));

t.test('rows are there until they were evaluated', async (t) => {
  const { close, rows: read } = EncodedRows.prototype;
  const closed = new Set<EncodedRows>();
  t.teardown(() => Object.assign(EncodedRows.prototype, { close, rows: read }));
  EncodedRows.prototype.close = async function () {
    closed.add(this);
    await close.call(this);
  };
  EncodedRows.prototype.rows = async function (indices) {
    if (closed.has(this)) throw new Error('read after they were closed');
    return read.call(this, indices);
  };
  const trainer = await create(t, { evalDataset: rows });
  const { loss } = await trainer.evaluate(rows);
  t.ok(loss > 0);
  t.equal(closed.size, 1, 'they are closed');
  const waiting = trainer.evaluate();
  await setImmediate();
  await trainer.dispose();
  t.same((await waiting).loss, loss, 'dispose() waits for what was begun');
});

t.test('an option that changes nothing is told of', async (t) => {
  t.teardown(() => setLogger(null));
  const told = async (options: Partial<TrainerOptions>) => {
    const names: unknown[] = [];
    setLogger((level, _, fields) => level === 'warn' && names.push((fields as { option?: string }).option));
    await (await create(t, options)).dispose();
    return names;
  };
  const sgd = { optimizer: 'sgd', lrScheduler: 'cosine', evalDataset: rows } as const;
  const given = { momentum: 0.9, evalSteps: 2, warmupSteps: 3, schedulerOptions: { numCycles: 1 } };
  t.same(await told(given), ['momentum', 'evalSteps', 'warmupSteps', 'schedulerOptions']);
  t.same(await told({ ...given, ...sgd }), [], 'these take effect');
  t.same(await told({ ...sgd, adamBeta2: 0.99, adamEpsilon: 1e-8 }), ['adamBeta2'], 'a default says nothing');
});
