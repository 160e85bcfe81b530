/** What data is like: mixed, looked at, explained, and trained on. */
import { readFileSync, writeFileSync } from 'node:fs';
import { cp } from 'node:fs/promises';
import { join } from 'node:path';
import t from 'tap';
import { encodeRow } from '../../lib/data/encode.js';
import { explainFile } from '../../lib/data/explain.js';
import { mixRows } from '../../lib/data/mixture.js';
import { logPreflight, preflight, usingRows } from '../../lib/data/preflight.js';
import { renderExplanation } from '../../lib/data/render-explain.js';
import type { RowStore } from '../../lib/data/row-store.js';
import type { Row } from '../../lib/data/rows.js';
import { QLoRATrainer, QuantizedModel } from '../../lib/index.js';
import { prepareDatasets } from '../../lib/train/dataset.js';
import { resolveTrainerOptions } from '../../lib/train/options.js';
import { encode, instruction, llama, logged, useCache } from '../support/data.js';
import { packageRoot, referencesDir } from '../support/references.js';

t.setTimeout(600_000); // a busy machine is slow

const tokenizers = referencesDir('tokenizers');
const demo = join(packageRoot(), 'examples', 'demo', 'model');

t.test('weights are how often rows come', async (t) => {
  const all = Uint32Array.from({ length: 30 }, (_, i) => i);
  const parts = (...weights: number[]) => weights.map((weight, i) => ({ start: 10 * i, end: 10 * (i + 1), weight }));
  const counts = (rows: Uint32Array) => [0, 1, 2].map((p) => rows.filter((row) => Math.floor(row / 10) === p).length);
  t.same(mixRows(all, parts(1, 1, 1), 1), all);
  t.same(mixRows(all, parts(7, 7, 7), 1), all, 'only their proportion matters');
  t.same(counts(mixRows(all, parts(0.5, 1, 1.25), 1)), [10, 20, 25]);
  const mixed = mixRows(all, parts(1, 2.5, 1), 1);
  const times = [...all].map((row) => mixed.filter((other) => other === row).length);
  t.same(times.slice(0, 10), Array(10).fill(1), 'every row comes');
  t.same(times.slice(10, 20).toSorted(), [2, 2, 2, 2, 2, 3, 3, 3, 3, 3]);
  t.same(mixRows(all, parts(1, 2.5, 1), 1), mixed, 'the same again');
  t.notSame(mixRows(all, parts(1, 2.5, 1), 2), mixed, 'another choice with another seed');
  const train = all.filter((row) => row % 2 === 0);
  t.ok(
    mixRows(train, parts(1, 3, 1), 1).every((row) => row % 2 === 0),
    'nothing that was split off comes back',
  );
  t.same(counts(mixRows(train, parts(1, 3, 1), 1)), [5, 15, 5]);
  t.same(counts(mixRows(all.slice(0, 10), parts(2, 1, 1), 1)), [10, 0, 0], 'a part without rows does not count');
  t.throws(() => mixRows(all, parts(1, 1e9, 1), 1), { code: 'ERR_QLORA_OPTION_INVALID', message: /weights/ });
});

t.test('preflight', async (t) => {
  const rows: Row[] = [
    { prompt: 'a', completion: 'b' },
    { prompt: 'the house '.repeat(30), completion: 'c' },
    { prompt: 'a', completion: 'b' },
    { prompt: 'a', completion: '  ' },
    {
      messages: [
        { role: 'user', content: 'a' },
        { role: 'assistant', content: '' },
      ],
    },
    { text: 'the city' },
    { prompt: 'a', completion: 'b' },
  ];
  const one = { ...(await encode(rows, { encoding: { template: 'plain', maxLength: 20 } })), weight: 2, name: 'one' };
  const two = {
    ...(await encode([{ text: 'the water' }, { text: 'the city' }, { inputIds: [1, 2, 3] }])),
    weight: 1,
    name: 'two',
    total: 75_000,
  };
  const report = await preflight([one, two]);
  const lengths = [...Array(7).keys()].map((i) => one.rows.tokens(i));
  t.match(report, {
    rows: 10,
    truncatedRows: 1,
    truncatedShare: 0.1,
    duplicates: {
      count: 3,
      rows: [
        { source: 'one', row: 3, sameAs: { source: 'one', row: 1 } },
        { source: 'one', row: 7, sameAs: { source: 'one', row: 1 } },
        { source: 'two', row: 2, sameAs: { source: 'one', row: 6 } },
      ],
    },
    emptyTargets: {
      count: 2,
      rows: [
        { source: 'one', row: 4 },
        { source: 'one', row: 5 },
      ],
    },
    sources: [
      { name: 'one', used: 7, total: 7, weight: 2, tokens: lengths.reduce((a, b) => a + b) },
      { name: 'two', used: 3, total: 75_000, weight: 1 },
    ],
  });
  t.equal(report.longest.length, 5);
  t.same(report.longest[0], { source: 'one', row: 2, tokens: 20 });
  t.same(
    report.longest.map(({ tokens }) => tokens),
    report.longest.map(({ tokens }) => tokens).toSorted((a, b) => b - a),
  );
  const stores = [one.rows, two.rows];
  const sum = (of: (rows: typeof one.rows, i: number) => number) =>
    stores.reduce((n, store) => n + [...Array(store.count).keys()].reduce((m, i) => m + of(store, i), 0), 0);
  t.equal(
    report.tokens,
    sum((store, i) => store.tokens(i)),
  );
  t.equal(
    report.targetTokens,
    sum((store, i) => store.targets(i)),
  );
  t.equal(report.truncatedTokens, one.rows.truncated(1));
  const { lines } = await logged(async () => logPreflight(report));
  t.match(lines, [
    /^info: preflight: 10 rows; .* 1 rows cut \(10\.0%\); 3 duplicates/,
    /^warn: 3 rows are equal .*: 3 \(as 1\), 7/,
    /^warn: 2 rows have a blank answer: 4, 5$/,
  ]);
  t.equal(usingRows({ name: 'X', used: 1000, total: 75_000 }), 'using 1,000 of 75,000 rows of X');
  t.equal(usingRows({ name: 'X', used: 1000, total: undefined }), 'using 1,000 rows of X');
  const twins = { ...(await encode(Array.from({ length: 1000 }, (_, i) => instruction(i % 500)))), weight: 1 };
  t.equal((await preflight([twins])).duplicates.count, 500);
});

t.test('explained in colour, without a weight', async (t) => {
  useCache(t, t.testdir({ cache: {} }));
  const words = 'the house is near the water '.repeat(12);
  const dir = t.testdir({
    'a.jsonl': [
      { prompt: 'the \u001b[2Jhouse\n', completion: 'the city\u202e' },
      { prompt: words, completion: words },
      { messages: [{ role: 'user', content: 'x' }] },
    ]
      .map((row) => JSON.stringify(row))
      .join('\n'),
  });
  const rows = [];
  const options = { sourceMaxLength: 20, targetMaxLength: 12, template: 'plain' };
  for await (const row of explainFile(join(dir, 'a.jsonl'), join(tokenizers, 'llama2-like'), options)) rows.push(row);
  t.equal(rows.length, 3);
  const [first, second, third] = rows as [(typeof rows)[0], (typeof rows)[0], (typeof rows)[0]];
  const whole = encodeRow({ prompt: words, completion: words }, llama, { maxLength: 10_000 }).ids;
  const kept = [...second.tokens];
  for (const { at, tokens } of second.cuts.toReversed()) kept.splice(at, 0, ...tokens);
  t.equal(kept.join(''), explainText([...whole]), 'what was kept and what was cut are the whole');
  t.equal(second.cuts.length, 2);
  t.equal(
    second.cuts.reduce((n, { tokens }) => n + tokens.length, 0),
    second.truncated,
  );

  const text = renderExplanation(first, 'plain');
  t.match(text, /^row 1 of .*a\.jsonl \(line 1\): \d+ tokens, \d+ trained\n/);
  t.match(text, /« ?the city/);
  t.notOk(text.includes('\u001b') || text.includes('\u202e'), 'a row cannot steer the terminal');
  t.match(text, '\\u{1b}[2J');
  const coloured = renderExplanation(second, 'ansi');
  t.ok(coloured.includes('\u001b[32m') && coloured.includes('\u001b[31;9m'));
  t.match(renderExplanation(second, 'plain'), /\{-.* more \.\.\. .*-\}/s);
  t.match(renderExplanation(third, 'plain'), /NOTHING is trained/);
  const limited = [];
  for await (const row of explainFile(join(dir, 'a.jsonl'), llama.directory, { ...options, skip: 1, limit: 1 }))
    limited.push(row);
  t.match(limited, [{ place: { row: 2 } }]);
});

function explainText(ids: number[]): string {
  return ids.map((id) => Buffer.from(llama.surface(id)).toString()).join('');
}

t.test('a trainer over several files', async (t) => {
  const dir = t.testdir({
    cache: {},
    'header.csv': 'instruction,output\n',
    'a.csv': `instruction,output\n${Array.from({ length: 40 }, (_, i) => `Double ${i}.,${2 * i}`).join('\n')}\nDouble 1.,2\n`,
    'b.jsonl': Array.from({ length: 12 }, (_, i) =>
      JSON.stringify({ prompt: `${i} + 1 = `, completion: `${i + 1}` }),
    ).join('\n'),
  });
  useCache(t, join(dir, 'cache'));
  const options = {
    model: demo,
    outputDir: join(dir, 'out'),
    lora: { r: 2 },
    maxSteps: 1,
    batchSize: 8,
    gradientAccumulationSteps: 1,
    learningRate: 1e-3,
  };
  const dataset = [
    { source: join(dir, 'a.csv'), maxSamples: 1000 },
    { source: join(dir, 'b.jsonl'), maxSamples: 10, weight: 3, format: 'prompt-completion' },
  ];
  const { result: trainer, lines } = await logged(() => QLoRATrainer.create({ ...options, dataset, evalDataset: 4 }));
  t.ok(lines.includes(`info: using 41 of 41 rows of ${join(dir, 'a.csv')}`), lines.join('\n'));
  t.ok(lines.includes(`info: using 10 of 12 rows of ${join(dir, 'b.jsonl')}`));
  t.ok(lines.includes('info: 47 rows to train on, 4 set apart for evaluation'));
  await t.rejects(QLoRATrainer.create({ ...options, dataset: join(dir, 'header.csv') }), {
    code: 'ERR_QLORA_DATASET_EMPTY',
    message: /of .*header\.csv has no rows/,
  });
  t.match(trainer.preflight, {
    split: { train: 47, eval: 4 },
    rows: 51,
    duplicates: { count: 1, rows: [{ row: 41, sameAs: { row: 2 } }] },
  });
  const resolved = resolveTrainerOptions({ ...options, dataset, evalDataset: 4, maxTrainSamples: 45 });
  const datasets = await prepareDatasets(trainer.model.core, resolved);
  const keys = async (rows: RowStore | undefined) =>
    (await (rows as RowStore).rows([...Array(rows?.count ?? 0).keys()])).map(({ ids }) => ids.join());
  const [train, apart] = [await keys(datasets.train), await keys(datasets.eval)];
  t.equal(apart.length, 4);
  // Double 1. is there twice, and may be on both sides.
  const twice = encodeRow({ instruction: 'Double 1.', output: '2' }, trainer.model.core.tokenizer).ids.join();
  t.notOk(
    apart.some((key) => key !== twice && train.includes(key)),
    'what is set apart is not trained',
  );
  const times = [...new Set(train)].map((key) => train.filter((other) => other === key).length);
  t.ok(times.includes(3) && train.length > 45, 'rows of weight 3 come three times, those of weight 1 once');
  t.equal(new Set(train).size + (train.filter((key) => key === twice).length > 1 ? 1 : 0), 45, 'maxTrainSamples rows');
  await datasets.close();
  const { loss } = await trainer.evaluate();
  const given = await trainer.evaluate(join(dir, 'b.jsonl'));
  t.ok(Number.isFinite(loss) && Number.isFinite(given.loss));
  t.match(await trainer.train(), { steps: 1, stopped: false });
  await trainer.dispose();

  const chat = await QLoRATrainer.create({
    ...options,
    dataset: join(dir, 'a.csv'),
    template: 'gemma',
    maxTrainSamples: 8,
  });
  t.equal(chat.preflight.rows, 8);
  t.match((await chat.explain({ instruction: 'q', output: 'a' })).tokens.join(''), '<start_of_turn>user');
  await chat.train();
  await chat.dispose();
  t.match(JSON.parse(readFileSync(join(dir, 'out', 'qlora_node.json'), 'utf8')), {
    template: 'gemma',
    chatTemplate: 'gemma',
  });
  const bad = QLoRATrainer.create({ ...options, dataset: [{ inputIds: [1, 2, 99_999] }] });
  await t.rejects(bad, { code: 'ERR_QLORA_TOKEN_ID', message: /row 1: inputIds\[2\]/ });
});

t.test("an answer ends at the token that ends it in the adapter's template", async (t) => {
  const dir = t.testdir({ model: {} });
  const folder = join(dir, 'model');
  await cp(demo, folder, { recursive: true });
  const prompt = { instruction: 'Double 4.' };
  const ids: number[] = [];
  {
    await using model = await QuantizedModel.load(demo);
    model.addLora('a', { r: 1 });
    await model.adapters.get('a')?.save(join(dir, 'adapter'));
    const tokens = model.core.tokenizer?.encode('### Response: ') ?? [];
    for await (const id of model.generateTokens(tokens, { maxNewTokens: 3 })) ids.push(id);
  }
  // The first token of its answer is the one that ends an answer in ChatML.
  const json = JSON.parse(readFileSync(join(folder, 'tokenizer.json'), 'utf8'));
  json.added_tokens.push({ id: ids[0], content: '<|im_end|>', special: true });
  writeFileSync(join(folder, 'tokenizer.json'), JSON.stringify(json));
  await using model = await QuantizedModel.load(folder);
  const start = model.core.tokenizer?.encode('### Response: ') ?? [];
  const count = async (template: string) => {
    writeFileSync(join(dir, 'adapter', 'qlora_node.json'), JSON.stringify({ template }));
    await model.loadLora(template, join(dir, 'adapter'));
    const out = await model.generateTokens(start, { maxNewTokens: 3, adapter: template });
    const asked = await model.generate(prompt, { maxNewTokens: 3, adapter: template });
    return [out.length, typeof asked] as const;
  };
  t.same(await count('alpaca'), [ids.length, 'string']);
  t.same(await count('chatml'), [0, 'string']);
});

t.test('every option of data reaches the rows', async (t) => {
  const lines = (count: number) =>
    Array.from({ length: count }, (_, i) => JSON.stringify({ text: `row ${i}` })).join('\n');
  const dir = t.testdir({ cache: {}, 'a.jsonl': lines(9), 'b.jsonl': lines(7) });
  useCache(t, join(dir, 'cache'));
  await using model = await QuantizedModel.load(demo);
  const { core } = model;
  const base = { model, outputDir: join(dir, 'out'), dataset: join(dir, 'a.jsonl') };
  const counts = async (options: object) => {
    const { train, eval: apart, close } = await prepareDatasets(core, resolveTrainerOptions({ ...base, ...options }));
    await close();
    return [train.count, apart?.count];
  };
  t.same(await counts({}), [9, undefined]);
  t.same(await counts({ maxTrainSamples: 4 }), [4, undefined]);
  t.same(await counts({ evalDataset: join(dir, 'b.jsonl'), maxTrainSamples: 4, maxEvalSamples: 3 }), [4, 3]);
  t.same(await counts({ evalDataset: 5, maxTrainSamples: 3, maxEvalSamples: 2 }), [3, 2], 'of what was split');
  t.same(await counts({ evalDataset: 0.25 }), [7, 2]);

  const shown = async (options: object, row: Row) => {
    await using trainer = await QLoRATrainer.create({ ...base, ...options, lora: { r: 1 } });
    model.removeLora('default');
    return trainer.explain(row);
  };
  const words = 'add the numbers '.repeat(40);
  const long = { prompt: words, completion: words };
  const trained = ({ trained }: { trained: boolean[] }) => trained.filter(Boolean).length;
  const limited = await shown({ sourceMaxLength: 20, targetMaxLength: 10 }, long);
  t.same([limited.ids.length, trained(limited)], [30, 10], 'sourceMaxLength, targetMaxLength');
  t.equal((await shown({ maxLength: 24 }, long)).ids.length, 24, 'maxLength');
  const all = await shown({ trainOnSource: true }, { prompt: '1 + 1 = ', completion: '2' });
  t.ok(all.trained.every(Boolean), 'trainOnSource');
  const talk: Row = {
    messages: [1, 2].flatMap(() => [
      { role: 'user' as const, content: '1 + 1' },
      { role: 'assistant' as const, content: '2' },
    ]),
  };
  t.equal(2 * trained(await shown({ maskHistory: true }, talk)), trained(await shown({}, talk)), 'maskHistory');
  const completion = await QLoRATrainer.create({ ...base, datasetFormat: 'oasst1', lora: { r: 1 } });
  const text = await QLoRATrainer.create({ ...base, datasetFormat: 'text', model: demo, lora: { r: 1 } });
  t.equal(completion.preflight.tokens, text.preflight.tokens, 'datasetFormat: the same tokens');
  await completion.dispose();
  await text.dispose();
  await t.rejects(QLoRATrainer.create({ ...base, datasetFormat: 'chip2', model: demo }), {
    code: 'ERR_QLORA_ROW_INVALID',
    message: /<bot>/,
  });
});
