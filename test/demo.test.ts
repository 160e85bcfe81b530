/** The parts of the demo that need no model: what is asked and trained on, how it is scored, and its report. */
import { Writable } from 'node:stream';
import { setTimeout } from 'node:timers/promises';
import t from 'tap';
import { keyOf, makeData, numbersIn } from '../examples/demo/data.js';
import { type Answer, accuracy, ask } from '../examples/demo/measure.js';
import { oldSkillWeights, type Question } from '../examples/demo/old-skills.js';
import { progress } from '../examples/demo/progress.js';
import { makeReportData, samplesOf } from '../examples/demo/report-data.js';
import { reportExtras } from '../examples/demo/report-page.js';
import { training } from '../examples/demo/settings.js';
import { bytes } from '../lib/format.js';
import { duration, percent } from '../lib/report/format.js';
import { loadAssets, renderPage } from '../lib/report/page.js';
import { RunLog } from '../lib/report/run-log.js';
import { runPage } from '../lib/report/run-page.js';

const options = { seed: 1, heldOut: 400, oldSkills: 300, rows: 10_000, rehearsal: 0.3 };
const data = makeData(options);

/** Answers of an instruction, worked out anew from its words. */
const solutions: Record<string, (numbers: number[], q: Question) => string | number> = {
  subtract: ([a, b]) => (a as number) - (b as number),
  add: ([a, b]) => (a as number) + (b as number),
  'missing addend': (n) => Math.max(...n) - Math.min(...n),
  compare: (n, q) => (q.instruction.includes('larger') ? Math.max(...n) : Math.min(...n)),
  'count up': ([k, a]) => (a as number) + (k as number),
  'count down': ([k, a]) => (a as number) - (k as number),
  sort: (_, q) =>
    q.input
      .split(' ')
      .map(Number)
      .sort((a, b) => a - b)
      .join(' '),
  'spell backwards': (_, q) => q.input.split('').reverse().join(''),
  capitals: (_, q) => q.input.toUpperCase(),
  'count letters': (_, q) => q.input.length,
  repeat: ([times], q) => `${q.input} `.repeat(times as number).trim(),
  digits: ([n]) => String(n).split('').join(' '),
};

t.test('nothing that is asked is trained on', async (t) => {
  const asked = new Set([...data.subtractions, ...data.oldSkills].map(keyOf));
  t.equal(asked.size, 700, 'no question twice');
  t.same(
    data.training.filter((row) => asked.has(keyOf(row))),
    [],
  );
  const pairs = new Set(data.subtractions.map((q) => numbersIn(q).join()));
  t.same(
    data.training.filter((row) => pairs.has(numbersIn(row).join())),
    [],
    'no row names a held-out pair',
  );
});

t.test('what is asked and trained on', async (t) => {
  t.same(makeData(options), data, 'the seed decides');
  t.notSame(makeData({ ...options, seed: 2 }).subtractions, data.subtractions);

  const subtractions = data.training.filter(({ kind }) => kind === 'subtract');
  t.equal(data.training.length, options.rows);
  t.equal(subtractions.length, 7000, '30% are of old skills');
  const seen = new Map<string, number>();
  for (const { instruction } of subtractions) seen.set(instruction, (seen.get(instruction) ?? 0) + 1);
  t.equal(seen.size, 5050 - 400, 'every other pair is trained on');
  t.same([...new Set(seen.values())].sort(), [1, 2], 'each about as often');

  for (const [kind, weight] of oldSkillWeights) {
    t.equal(data.oldSkills.filter((q) => q.kind === kind).length, 3 * weight, kind);
    const share = data.training.filter((q) => q.kind === kind).length / 3000;
    t.ok(Math.abs(share - weight / 100) < 0.03, `${kind}: ${share} of the rehearsal`);
  }
  t.ok(
    data.oldSkills.some(({ input }) => input),
    'some with input',
  );

  for (const q of [...data.subtractions, ...data.oldSkills, ...data.training]) {
    const solve = solutions[q.kind];
    const expected = solve && String(solve((q.instruction.match(/\d+/g) ?? []).map(Number), q));
    if (expected !== undefined && expected !== q.output) t.equal(q.output, expected, keyOf(q));
    if (q.kind === 'subtract' && q.output.startsWith('-')) t.fail(`negative: ${q.instruction}`);
  }
});

t.test('asking', async (t) => {
  const questions = data.subtractions.slice(0, 100);
  let [underWay, most, done] = [0, 0, 0];
  const generate = async ({ instruction }: { instruction: string }, options: object) => {
    most = Math.max(most, ++underWay);
    const index = questions.findIndex((q) => q.instruction === instruction);
    // Later questions are answered first.
    await setTimeout((100 - index) / 10);
    underWay--;
    t.match(options, { adapter: 'a', doSample: false });
    const right = questions[index]?.output;
    return index < 25 ? ` ${right}\n` : index < 60 ? `${right}0` : '';
  };
  const model = { generate } as unknown as Parameters<typeof ask>[0];
  const answers = await ask(model, questions, {
    adapter: 'a',
    onAnswer: (n) => {
      done = n;
    },
  });
  t.same(
    answers.map(({ question }) => question),
    questions,
    'in the order of the questions',
  );
  t.equal(accuracy(answers), 0.25, 'a right beginning is not a right answer, nor is none');
  t.equal(done, 100);
  t.ok(most > 1 && most < 100, `${most} at once`);

  const failing = { generate: () => Promise.reject(new Error('no')) } as unknown as Parameters<typeof ask>[0];
  await t.rejects(ask(failing, questions, { adapter: null }), { message: 'no' });
});

t.test('progress without a terminal is ten plain lines', async (t) => {
  let text = '';
  const output = new Writable({
    write(chunk, _, next) {
      text += chunk;
      next();
    },
  }) as unknown as NodeJS.WriteStream;
  const bar = progress('training', 250, output);
  for (let i = 1; i <= 250; i++) bar.update(i, `loss ${i}`);
  bar.stop();
  const lines = text.trimEnd().split('\n');
  t.equal(lines.length, 10);
  t.equal(lines[0], '  training 10%  loss 25');
  t.equal(lines[9], '  training 100%  loss 250');
  t.notMatch(text, '\u001b');
});

t.test('numbers as people read them', async (t) => {
  t.same([0, 0.02, 0.9, 0.995, 1].map(percent), ['0%', '2%', '90%', '99.5%', '100%']);
  t.same([0, 999, 3448160, 312e6, 4.2e9].map(bytes), ['0 bytes', '999 bytes', '3.45 MB', '312 MB', '4.2 GB']);
  t.same([3.21, 84.4, 119.7].map(duration), ['3.2 seconds', '84 seconds', '2 min 0 s']);
});

t.test('the report', async (t) => {
  const hostile = `</script><img src=x onerror="alert('1')"> $& $1`;
  const answer = (question: Question, text: string): Answer => ({
    question,
    answer: text,
    right: text === question.output,
  });
  const before = {
    subtractions: data.subtractions.map((q) => answer(q, hostile)),
    oldSkills: data.oldSkills.map((q) => answer(q, q.output)),
  };
  const after = {
    subtractions: data.subtractions.map((q, i) => answer(q, i === 399 ? 'wrong' : q.output)),
    oldSkills: data.oldSkills.map((q, i) => answer(q, i % 2 ? q.output : hostile)),
  };
  const step = { type: 'step' as const, epoch: 0, gradNorm: 1, memoryBytes: 1e6 };
  const steps = [1, 2, 3].map((n) => ({
    ...step,
    step: n,
    loss: 1 / n,
    learningRate: 1e-3,
    tokensPerSecond: 1000 * n,
  }));
  const reportData = makeReportData({
    before,
    after,
    log: {
      result: { steps: 3, finalLoss: 0.3, outputDir: 'a', stopped: false },
      steps,
      checks: [{ step: 2, subtraction: 0.5, oldSkills: 0.75 }],
      seconds: 61,
      tokensPerSecond: 12_345,
    },
    seconds: 80,
    rows: { total: 10_000, rehearsal: 3000 },
    parameters: { total: 1_720_000, trained: 400_000 },
    memory: { process: 3e8, file: 3e6, model: 1e6, adapter: 2e6, training: 5e7 },
    adapterDir: hostile,
    settings: training,
    computeDtype: 'f32',
    device: 'cpu',
  });
  const run = new RunLog('adapter');
  for (const line of steps) run.add({ ...line, time: '2026-01-01T00:00:00.000Z' });
  const page = renderPage(runPage(run, reportExtras(reportData)), await loadAssets());

  t.match(reportData.accuracy, [
    { step: 0, subtraction: 0, oldSkills: 1 },
    { step: 2, subtraction: 0.5, oldSkills: 0.75 },
    { step: 3, subtraction: 399 / 400, oldSkills: 0.5 },
  ]);
  t.equal(reportData.oldSkills.kinds.length, oldSkillWeights.size);
  t.equal(
    reportData.oldSkills.kinds.reduce((sum, k) => sum + k.questions, 0),
    300,
  );

  t.test('shows answers as text', async (t) => {
    t.notMatch(page, "onerror=\"alert('1')");
    t.ok(page.includes('&lt;/script&gt;&lt;img src=x onerror=&quot;alert(&#39;1&#39;)&quot;&gt; $&amp; $1'));
  });
  t.test('draws accuracy and the curves of the run', async (t) => {
    const charts = JSON.parse(page.match(/id="charts">(.*?)<\/script>/s)?.[1] as string);
    t.same(charts.map(({ id }: { id: string }) => id).slice(0, 2), ['chart-accuracy', 'chart-loss']);
    t.same(charts[0].lines[0].y, [0, 0.5, 0.9975]);
    t.same(charts[1].lines[0].y, [1, 0.5, 0.333333]);
  });
  t.test('says what happened', async (t) => {
    for (const text of [
      '>0%<',
      '>99.8%<',
      '61 seconds',
      '12,345',
      '30%',
      'missing addend',
      '3000 rows of old skills',
    ]) {
      t.ok(page.includes(text), text);
    }
  });
  t.test('its samples hide no mistake', async (t) => {
    const samples = samplesOf(before.subtractions, after.subtractions, 12);
    t.equal(samples.length, 12);
    t.match(samples[11], { after: 'wrong', before: hostile });
    t.match(samples[0], { after: data.subtractions[0]?.output });
  });
});
