/** What a run leaves to look at: its log, its page, event files, and the comparison of several. */
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import t from 'tap';
import { compareRuns } from '../../lib/report/compare.js';
import { Curve, smooth } from '../../lib/report/curve.js';
import { clock, duration } from '../../lib/report/format.js';
import { embeddedJson } from '../../lib/report/html.js';
import { RunRecorder } from '../../lib/report/run-recorder.js';
import type { TrainEvent } from '../../lib/train/events.js';
import { QLoRATrainer } from '../../lib/train/trainer.js';
import {
  chartsOf,
  context,
  folder,
  hostile,
  lines,
  page,
  root,
  run,
  step,
  train,
  type Written,
} from '../support/recorded-runs.js';
import { packageRoot, readJson } from '../support/references.js';
import { writeTensorBoardEvents } from '../support/tensorboard-events.js';

t.test('metrics.jsonl', async (t) => {
  const directory = folder();
  await run(directory);
  const [start, ...rest] = lines(directory);
  t.same(start, { type: 'start', ...JSON.parse(JSON.stringify(context)) });
  t.same(
    rest.map(({ type, step }) => `${type} ${step}`),
    [
      ...['step 1', 'step 2'],
      ...['eval 3', 'sample 3', 'checkpoint 3'],
      ...['step 4', 'warning 5', 'step 6'],
      ...['eval 6', 'sample 6', 'checkpoint 6', 'end 6'],
    ],
    'the first step and those by loggingSteps, everything else as it comes',
  );
  t.same(rest[1], step(2), 'with all that the event has');
  t.match(rest[4], { path: 'checkpoint-3' }, 'a folder that can be moved');
  t.match(rest.at(-1), { status: 'finished', finalLoss: 1 / 6, peakMemoryBytes: 3_900_000 });
});

t.test('a resumed log equals that of a run which was never disturbed', async (t) => {
  const [whole, killed] = [folder(), folder()];
  await run(whole);
  const recorder = await RunRecorder.open(killed, context);
  train(recorder, 5);
  await recorder.flush();
  // No end, no close, and the last line is cut.
  const path = join(killed, 'metrics.jsonl');
  writeFileSync(path, `${readFileSync(path, 'utf8')}{"type":"step","st`);
  await run(killed, { resumeAt: 3 });
  t.same(lines(killed), lines(whole));
  await recorder.close();

  const stopped = folder();
  const first = await RunRecorder.open(stopped, context);
  train(first, 4);
  first.finish({ steps: 4, finalLoss: 1 / 4, stopped: true, outputDir: stopped }, 1);
  await first.close();
  t.match(page(stopped), 'stopped at step 4');
  for (const resumeAt of [4, undefined]) {
    await run(stopped, { resumeAt });
    t.same(lines(stopped), lines(whole), 'its first end is gone; without resume it begins anew');
  }
  const odd = folder();
  const early = await RunRecorder.open(odd, context);
  train(early, 5);
  early.finish({ steps: 5, finalLoss: 1 / 5, stopped: true, outputDir: odd }, 1);
  await early.close();
  t.match(lines(odd).slice(-2), [
    { type: 'step', step: 5 },
    { type: 'end', step: 5 },
  ]);
  await run(odd, { resumeAt: 5 });
  t.same(lines(odd), lines(whole), 'the last step of a run is there, unless it goes on');
  const end = readFileSync(join(odd, 'metrics.jsonl'), 'utf8');
  await run(odd, { resumeAt: 6 });
  t.equal(readFileSync(join(odd, 'metrics.jsonl'), 'utf8'), end, 'a finished run that is resumed ended when it did');

  const none = folder();
  await run(none, { resumeAt: 3 });
  t.equal(lines(none)[0]?.type, 'start', 'there need not be a log');
});

t.test('a log that was damaged is set aside', async (t) => {
  const directory = folder();
  await run(directory);
  const path = join(directory, 'metrics.jsonl');
  const before = readFileSync(path, 'utf8').replace('"type":"eval"', '"type":"evil"');
  writeFileSync(path, before);
  const warnings: string[] = [];
  await run(directory, { resumeAt: 3, onWarning: ({ code, message }) => warnings.push(`${code} ${message}`) });
  t.match(warnings, [/^REPORT_NOT_WRITTEN .*line 4 is no line of a training run/]);
  t.equal(readFileSync(`${path}.damaged`, 'utf8'), before);
  t.match(lines(directory).slice(0, 3), [{ type: 'start' }, { type: 'step', step: 1 }, { type: 'step', step: 2 }]);
});

t.test('what cannot be written is told once and ends nothing', async (t) => {
  const directory = folder();
  for (const name of ['metrics.jsonl', 'report.html']) mkdirSync(join(directory, name));
  const warnings: unknown[] = [];
  await run(directory, { onWarning: (warning) => warnings.push(warning) });
  t.match(warnings, [{ code: 'REPORT_NOT_WRITTEN', message: /training goes on/ }]);
  t.same(readdirSync(directory).sort(), ['metrics.jsonl', 'report.html'], 'nothing half-written stays');

  // Where the obstacle goes away, nothing is missing.
  const later = folder();
  mkdirSync(join(later, 'metrics.jsonl'));
  const recorder = await RunRecorder.open(later, context, { onWarning: (warning) => warnings.push(warning) });
  train(recorder, 3);
  await recorder.flush();
  rmSync(join(later, 'metrics.jsonl'), { recursive: true });
  train(recorder, 6, 4);
  recorder.fail(new Error(hostile));
  await recorder.close();
  t.equal(lines(later).filter(({ type }) => type === 'step').length, 4);
  t.match(lines(later).at(-1), { status: 'failed', step: 6, error: `Error: ${hostile}` });
  t.equal(warnings.length, 2);
});

t.test('report.html', async (t) => {
  const directory = folder();
  const recorder = await RunRecorder.open(directory, context);
  train(recorder, 4);
  await recorder.flush();
  t.match(page(directory), 'http-equiv="refresh"', 'it is there from the start, and grows');
  await recorder.close();
  t.match(page(directory), 'step 4 of 6');
  await run(directory);
  const html = page(directory);

  t.test('needs nothing beside itself', async (t) => {
    t.notMatch(html, /(https?:)?\/\/[a-z0-9-]+\.[a-z]/i, 'no address');
    t.notMatch(html, /<link|<iframe|<img|@import|url\(|\bimport\(|\bfetch\(|http-equiv/i);
    t.same(html.match(/<script[^>]*>/g), ['<script type="application/json" id="charts">', '<script>', '<script>']);
    t.ok(html.includes('var uPlot='), 'the charts are inside');
    t.ok(html.includes('.u-legend'), 'with their style');
  });
  t.test('shows what strangers wrote as text', async (t) => {
    t.notMatch(html, "onerror=\"alert('1')");
    const text = '&lt;/script&gt;&lt;img src=x onerror=&quot;alert(&#39;1&#39;)&quot;&gt; &lt;!-- $&amp; $1';
    t.equal(html.split(text).length - 1, 6, 'model, option, prompt, answer, warning, source');
  });
  t.test('embeds what strangers wrote', async (t) => {
    const { html: json } = embeddedJson({ text: hostile });
    t.notMatch(json, '<');
    t.same(JSON.parse(json), { text: hostile });
  });
  t.test('draws every step', async (t) => {
    const [loss, , , , memory] = chartsOf(html);
    t.same(loss.lines[0], {
      label: 'Each step',
      color: 'past',
      width: 1,
      alpha: 0.55,
      x: [1, 2, 3, 4, 5, 6],
      y: [1, 0.5, 0.333333, 0.25, null, 0.166667],
    });
    t.match(loss.lines[2], { label: 'Eval loss', x: [3, 6], y: [0.666667, 0.333333] });
    t.match(memory.lines[1], { label: 'Plan', y: [4e6, 4e6, 4e6, 4e6, 4e6, 4e6] });
    for (const { id } of chartsOf(html)) t.match(html, `id="${id}" role="img" aria-label="`);
  });
  t.test('says what happened', async (t) => {
    const texts = [
      'step 6, finished',
      'Loss <span class="from">1.000</span>',
      '<span class="to">0.167</span>',
      '12,345 numbers',
      '98% of the plan',
      '51,760',
      '51,000 rows to train on, 760 set apart for evaluation',
      '1,000 of 75,000',
      'checkpoint-3',
      '>one<',
    ];
    texts.push('25% of them trained', '8 rows lost 77 tokens', 'is equal to row 4 of b');
    for (const text of texts) t.ok(html.includes(text), text);
  });
});

t.test('a long run is drawn with few points', async (t) => {
  const curve = new Curve(4);
  for (let n = 1; n <= 9; n++) curve.push(step(n, n) as Parameters<Curve['push']>[0]);
  t.same(curve.column('step'), [4, 8, 9], 'neighbours are joined twice');
  t.same(curve.column('loss'), [2.5, 6.5, 9], 'a mean of all that lie in one');
  const twice = new Curve(2);
  for (let n = 1; n <= 8; n++) twice.push(step(n, n) as Parameters<Curve['push']>[0]);
  t.same(twice.column('loss'), [2.5, 6.5], 'each of four counts the same');
  const gap = new Curve(2);
  for (const loss of [Number.NaN, 2, 4, Number.POSITIVE_INFINITY])
    gap.push(step(1, loss) as Parameters<Curve['push']>[0]);
  t.same(gap.column('loss'), [2, 4], 'what is not finite does not count');
  const gone = Number.NaN;
  t.same(smooth([0, 1, 2, 3, 60], [1, 2, gone, 6, 7]), [1.5, 1.5, 4, 6, 7], 'over a sixtieth of the steps');
  t.same(smooth([10, 20, 29, 30], [8, 4, 2, 1]), [8, 4, 2, 1], 'a step far away is none of its neighbours');
  t.same(smooth([0, 30, 60], [1, gone, 2]), [1, gone, 2]);
  t.same([7, 62, 3723].map(clock), ['0:07', '1:02', '1:02:03']);
  t.equal(duration(7260), '2 h 1 min');

  const directory = folder();
  const recorder = await RunRecorder.open(directory, { ...context, totalSteps: 9000 });
  for (let n = 1; n <= 9000; n++) recorder.event(step(n));
  await recorder.close();
  const { x } = chartsOf(page(directory))[0].lines[0];
  t.ok(x.length > 1000 && x.length <= 2000, `${x.length} points`);
  t.equal(x.at(-1), 9000);
  t.equal(lines(directory).length, 1 + 1 + 4500);
});

t.test('event files for TensorBoard', async (t) => {
  const made = folder();
  const reference = join(packageRoot(), 'test', 'references', 'tensorboard');
  for (const name of await writeTensorBoardEvents(made)) {
    t.same(readFileSync(join(made, name)), readFileSync(join(reference, name)), `${name}: byte for byte`);
  }
  // What TensorBoard's own reader saw in these bytes: step 3 of the first file is forgotten for that of the second.
  const { scalars } = readJson<{ scalars: Record<string, number[][]> }>(reference, 'expected.json');
  t.same(
    scalars['train/loss']?.map(([, n, loss]) => [n, loss]),
    [[1, 2.5], [2, 2.25], [3, 2], [300, null]],
  ); // biome-ignore format: pairs
  t.equal(Object.keys(scalars).length, 6);

  const directory = folder('named');
  await run(directory, {}, { options: { ...context.options, reportTo: 'tensorboard' } });
  const runs = join(directory, 'runs', 'named');
  const [file, ...more] = readdirSync(runs);
  t.match(file as string, /^events\.out\.tfevents\.\d{10}\./);
  t.same(more, []);
  const bytes = readFileSync(join(runs, file as string)).toString('latin1');
  const seen = [...bytes.matchAll(/(train|eval)\/[a-z_]+/g)].map(([tag]) => tag);
  t.equal(seen.filter((tag) => tag === 'train/loss').length, 4, 'at the steps that are logged');
  t.equal(seen.filter((tag) => tag === 'eval/perplexity').length, 2);
  await run(directory, { resumeAt: 3 }, { options: { ...context.options, reportTo: 'tensorboard' } });
  t.notOk(readdirSync(folder('plain')).includes('runs'));
});

t.test('compare', async (t) => {
  const [a, b] = [folder('one/lr'), folder('two/lr')];
  const hot = folder('hot');
  await run(a);
  await run(b, {}, { options: { ...context.options, learningRate: 1e-3, outputDir: b } });
  const going = await RunRecorder.open(hot, { ...context, options: { loggingSteps: 2, template: hostile } });
  train(going, 4);
  await going.close();
  const out = join(root, 'compare.html');
  await compareRuns([a, b, hot], out);
  const html = readFileSync(out, 'utf8');
  const charts = chartsOf(html);
  t.same(
    charts[0].lines.map(({ label }: { label: string }) => label),
    ['one/lr', 'two/lr', basename(hot)],
  );
  t.same(charts[1].lines[0].y, [0.666667, 0.333333], 'eval loss');
  t.equal(new Set(charts[0].lines.map(({ color }: { color: string }) => color)).size, 3);
  const table = html.slice(html.indexOf('Options that differ'));
  const rows = [...table.matchAll(/<tr><th scope="row"><code>(\w+)<\/code><\/th>(.*?)<\/tr>/gs)];
  t.same(
    rows.map(([, name, cells]) => [
      name,
      ...[...(cells as string).matchAll(/<code>(.*?)<\/code>/g)].map(([, v]) => v?.slice(0, 12)),
    ]),
    [
      ['model', 'models/tiny', 'models/tiny', '&lt;/script&'],
      ['learningRate', '0.0002', '0.001', '–'],
    ],
    'not what is the same, nor where it lies',
  );
  t.match(html, 'running or killed');
  const ends = html.slice(html.indexOf('How they ended'), html.indexOf('How they learnt'));
  const cells = (row: string) => [...row.matchAll(/<td[^>]*>(.*?)<\/td>/gs)].map(([, cell]) => cell);
  const ended = ends.split('<tr>').slice(2).map(cells);
  t.match(
    ended,
    [
      [/finished/, '6', '0.167'],
      [/finished/, '6', '0.167'],
      [/running/, '4', '0.250'],
    ],
    'steps and loss',
  );

  await t.rejects(compareRuns([a], out), { code: 'ERR_QLORA_ARGUMENT' });
  await t.rejects(compareRuns([a, folder('empty')], out), { code: 'ERR_QLORA_RUN_NOT_FOUND', hint: /outputDir/ });
  writeFileSync(join(folder('empty'), 'metrics.jsonl'), '{"a":1}\n{"a":2}\n');
  await t.rejects(compareRuns([a, folder('empty')], out), { code: 'ERR_QLORA_RUN_INVALID', message: /line 1 / });
});

t.test('a trainer leaves them in its outputDir', async (t) => {
  const rows = Array.from({ length: 24 }, (_, n) => ({ instruction: `Double ${n}.`, output: String(2 * n) }));
  const options = {
    model: join(packageRoot(), 'examples', 'demo', 'model'),
    dataset: rows.slice(3),
    evalDataset: [{ text: 'all of it is trained' }, ...rows.slice(0, 3)],
    lora: { r: 8, alpha: 8, targetModules: /.*_proj/ },
    batchSize: 7,
    gradientAccumulationSteps: 1,
    learningRate: 4e-3,
    maxSteps: 6,
    evalSteps: 3,
    saveSteps: 4,
    loggingSteps: 2,
  };
  /** The log without what takes its time. */
  const logOf = (directory: string) =>
    lines(directory).map(({ tokensPerSecond, memoryBytes, peakMemoryBytes, ...line }) => line);

  const whole = folder();
  await using trainer = await QLoRATrainer.create({ ...options, outputDir: whole });
  const events: TrainEvent[] = [];
  for await (const event of trainer.train()) events.push(event);
  const [start, ...rest] = lines(whole);
  t.match(start, {
    totalSteps: 6,
    options: { dataset: '21 rows of the program', evalDataset: '4 rows of the program', epochs: undefined, seed: 42 },
    model: { device: 'cpu', trainableParameters: trainer.adapter?.trainableParameters },
  });
  t.match(start?.options, { lora: { targetModules: '/.*_proj/' }, model: options.model });
  t.same(
    rest.map(({ type, step }) => `${type} ${step}`),
    [
      ...['step 1', 'step 2', 'eval 3', 'sample 3', 'sample 3', 'step 4', 'checkpoint 4', 'step 6'],
      ...['eval 6', 'sample 6', 'sample 6', 'checkpoint 6', 'end 6'],
    ],
    'of three rows, the one without a prompt is not asked',
  );
  t.same(rest[1], events[1], 'with what the event said');
  const samples = rest.filter(({ type }) => type === 'sample');
  t.match(samples[0], { prompt: /Double 0\.\n\n### Response:$/, expected: '0' });
  const { instruction } = rows[1] as { instruction: string };
  const asked = await trainer.model.generate({ instruction }, { doSample: false, maxNewTokens: 64 });
  t.equal(samples[3]?.text, asked.trim(), 'what the model answers at that step');
  t.match(page(whole), 'step 6, finished');
  t.match(page(whole), '<div class="card sample"><p class="text">Double 0.</p>', 'the page has the question alone');

  // Stopped and resumed: the same log.
  const parts = folder();
  {
    await using first = await QLoRATrainer.create({ ...options, outputDir: parts });
    for await (const event of first.train()) if (event.type === 'step' && event.step === 5) break;
    t.match(lines(parts).at(-1), { type: 'end', status: 'stopped' });
  }
  for (const n of [5, 6]) rmSync(join(parts, `checkpoint-${n}`), { recursive: true, force: true });
  await using second = await QLoRATrainer.create({ ...options, outputDir: parts });
  await second.train({ resume: true });
  const name = (line: Written) =>
    line.options ? { ...line, options: { ...(line.options as object), outputDir: '' } } : line;
  t.same(logOf(parts).map(name), logOf(whole).map(name));

  const failing = folder();
  await using bad = await QLoRATrainer.create({ ...options, outputDir: failing, learningRate: 1e30, evalSteps: 1 });
  await t.rejects(Promise.resolve(bad.train()), { code: 'ERR_QLORA_DIVERGED' });
  t.match(lines(failing).at(-1), { type: 'end', status: 'failed', error: /QLoRAError: 5 steps in a row/ });
  t.match(page(failing), 'failed after step');
});
