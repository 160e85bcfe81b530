/** Rows tokenized once: in slices and in threads, in memory and in files, from the cache; mixed, looked at, explained. */
import { createHash } from 'node:crypto';
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { cp } from 'node:fs/promises';
import { join } from 'node:path';
import t, { type Test } from 'tap';
import { type EncodedRow, encodeRow } from '../../lib/data/encode.js';
import { type EncodedSource, encodeSource, type SourceOptions } from '../../lib/data/encode-source.js';
import { explainFile } from '../../lib/data/explain.js';
import { mixRows } from '../../lib/data/mixture.js';
import { logPreflight, preflight, preflightFacts, usingRows } from '../../lib/data/preflight.js';
import type { DatasetSource } from '../../lib/data/read-rows.js';
import { renderExplanation } from '../../lib/data/render-explain.js';
import { ConcatenatedRows, MemoryRows, SelectedRows } from '../../lib/data/row-store.js';
import type { Row } from '../../lib/data/rows.js';
import { QLoRATrainer, setLogger } from '../../lib/index.js';
import { Tokenizer } from '../../lib/tokenizer/tokenizer.js';
import { packageRoot, referencesDir } from '../support/references.js';

t.setTimeout(600_000); // a busy machine is slow

const tokenizers = referencesDir('tokenizers');
const llama = await Tokenizer.load(join(tokenizers, 'llama2-like'));

const instruction = (i: number) => ({
  instruction: `Question ${i}: ${'the house near the water '.repeat(i % 7)}`,
  ...(i % 3 === 0 && { input: `input ${i}` }),
  output: `answer ${i} `.repeat(1 + (i % 5)),
});
const many: Row[] = Array.from({ length: 400 }, (_, i) => instruction(i));

function encode(source: DatasetSource, options: Partial<SourceOptions> = {}): Promise<EncodedSource> {
  return encodeSource(source, llama, { encoding: {}, vocabSize: 1e6, check: () => {}, ...options });
}
const plain = (rows: readonly EncodedRow[]) =>
  rows.map(({ ids, labels, truncated, cut }) => ({ ids: [...ids], labels: [...labels], truncated, cut }));
const digest = (value: unknown) => createHash('sha256').update(JSON.stringify(value)).digest('hex');
/** Of all rows: comparing them one by one takes minutes. */
async function contentOf({ rows }: EncodedSource) {
  const all = plain(await rows.rows(Array.from({ length: rows.count }, (_, i) => i)));
  all.forEach(({ ids, labels }, i) => {
    if (rows.tokens(i) !== ids.length) throw new Error(`row ${i}: tokens`);
    if (rows.targets(i) !== labels.slice(1).filter((l) => l !== -100).length) throw new Error(`row ${i}: targets`);
  });
  return digest(all);
}

/** A folder for the cache, of this test alone. */
function useCache(t: Test, folder: string): () => string[] {
  const before = process.env.QLORA_CACHE;
  process.env.QLORA_CACHE = folder;
  t.teardown(() => {
    if (before === undefined) delete process.env.QLORA_CACHE;
    else process.env.QLORA_CACHE = before;
  });
  return () => readdirSync(folder).sort();
}

async function logged<T>(work: () => Promise<T>): Promise<{ result: T; lines: string[] }> {
  const lines: string[] = [];
  setLogger((level, message) => lines.push(`${level}: ${message}`));
  try {
    return { result: await work(), lines };
  } finally {
    setLogger(null);
  }
}

t.test('in slices, in threads, in a file: the same rows', async (t) => {
  const dir = t.testdir({ cache: {} });
  const files = useCache(t, join(dir, 'cache'));
  const encoding = { sourceMaxLength: 60, targetMaxLength: 12 };
  const rows: Row[] = [...many, { inputIds: [5, 6, 7], labels: [-100, 9, -100] }, { inputIds: [4, 3] }];
  const expected = plain(rows.map((row) => encodeRow(row, llama, encoding)));
  t.ok(expected.some(({ truncated }) => truncated > 0));
  const inSlices = await encode(rows, { encoding });
  t.notOk(inSlices.rows.inFile);
  t.equal(await contentOf(inSlices), digest(expected));
  t.match(inSlices, { name: 'the program', total: rows.length });
  const inThreads = await encode(rows, { encoding, threadsFrom: 0, memoryBytes: 4096 });
  t.ok(inThreads.rows.inFile);
  t.equal(await contentOf(inThreads), digest(expected), 'from threads, in a file');
  t.equal(digest([...inThreads.rows.index]), digest([...inSlices.rows.index]));
  t.same(files(), [], 'the file is unlinked, rows of a program are not kept');
  await inThreads.rows.close();
  await t.rejects(inThreads.rows.rows([0]), 'closed');

  async function* generated(): AsyncGenerator<Row> {
    for (let i = 0; i < 1200; i++) yield instruction(i);
  }
  const streamed = await encode(generated(), { memoryBytes: 1000, threadsFrom: 50_000 });
  t.equal(streamed.rows.count, 1200);
  const at = [1199, 0, 834];
  t.same(plain(await streamed.rows.rows(at)), plain(at.map((i) => encodeRow(instruction(i), llama))));
  await streamed.rows.close();

  async function* endless(): AsyncGenerator<Row> {
    for (let i = 0; ; i++) yield instruction(i);
  }
  const some = await encode(endless(), { limit: 20 });
  t.match(some, { rows: { count: 20 }, total: undefined });

  // What fails in a thread is the same error as without it.
  const wrong: Row[] = [...many, { instruction: 'x '.repeat(50), output: 'y' }];
  const short = { sourceMaxLength: 9 };
  for (const threadsFrom of [0, 1e9]) {
    await t.rejects(encode(wrong, { encoding: short, threadsFrom }), {
      code: 'ERR_QLORA_MAX_LENGTH',
      message: /^Row 1 /,
      hint: /Raise/,
    });
  }
  await t.rejects(
    encode(many, {
      check: (_ids, _labels, { row }) => {
        if (row === 123) throw new Error('checked');
      },
    }),
    { message: 'checked' },
  );
});

t.test('the event loop goes on while threads encode', async (t) => {
  let turns = 0;
  const timer = setInterval(() => turns++, 1);
  t.teardown(() => clearInterval(timer));
  await encode(
    Array.from({ length: 2000 }, (_, i) => instruction(i)),
    { threadsFrom: 0 },
  );
  t.ok(turns > 20, `${turns} turns`);
});

t.test('the cache', async (t) => {
  const dir = t.testdir({ cache: {}, data: {} });
  const files = useCache(t, join(dir, 'cache'));
  const path = join(dir, 'data', 'a.jsonl');
  const write = (rows: readonly Row[]) => writeFileSync(path, rows.map((row) => JSON.stringify(row)).join('\n'));
  write(many);
  const fresh = await encode(path, { limit: 300 });
  t.equal(files().length, 1);
  const firstKey = files()[0] as string;
  t.match(firstKey, /^[0-9a-f]{64}\.rows$/);
  const { result: again, lines } = await logged(() =>
    encode(path, { limit: 300, check: () => t.fail('encoded anew') }),
  );
  t.match(lines.join('\n'), /come from the cache/);
  t.equal(await contentOf(again), await contentOf(fresh));
  t.match(again, { total: 400, name: path });
  const large = await encode(path, { limit: 300, memoryBytes: 1000 });
  t.ok(large.rows.inFile, 'what is large stays in its file');
  t.equal(await contentOf(large), await contentOf(fresh));
  await large.rows.close();

  // Whatever decides about the rows makes another key.
  const other = join(dir, 'other');
  await cp(llama.directory, other, { recursive: true });
  const touched = await Tokenizer.load(other);
  const before = files().length;
  await encode(path, { limit: 299 });
  await encode(path, { limit: 300, encoding: { maxLength: 50 } });
  await encode(path, { limit: 300, encoding: { template: 'plain' } });
  await encode(path, { limit: 300, format: 'alpaca' });
  await encode(path, { limit: 300, vocabSize: 1e5 });
  await encodeSource(path, touched, { limit: 300, encoding: {}, vocabSize: 1e6, check: () => {} });
  t.equal(files().length, before + 5, 'the same tokenizer elsewhere is the same');
  writeFileSync(join(other, 'chat_template.jinja'), 'x');
  await encodeSource(path, touched, { limit: 300, encoding: {}, vocabSize: 1e6, check: () => {} });
  write(many.toReversed());
  const turned = await encode(path, { limit: 300 });
  t.equal(files().length, before + 7);
  t.not(await contentOf(turned), await contentOf(fresh));

  // Damage anywhere is found, said, and repaired.
  write(many);
  const entry = join(dir, 'cache', firstKey);
  const good = readFileSync(entry);
  const damage: Record<string, (bytes: Buffer) => Buffer> = {
    'a token': (bytes) => bytes.fill((bytes[40] as number) ^ 1, 40, 41),
    'the index': (bytes) => bytes.fill(0x7f, bytes.length - 400, bytes.length - 390),
    'the checksum': (bytes) => bytes.fill(1, bytes.length - 3),
    'cut short': (bytes) => bytes.subarray(0, bytes.length / 2),
    empty: () => Buffer.alloc(0),
  };
  for (const [what, change] of Object.entries(damage)) {
    writeFileSync(entry, change(Buffer.from(good)));
    const { result, lines } = await logged(() => encode(path, { limit: 300 }));
    t.match(lines.join('\n'), /warn: the cached rows in .* cannot be used and are made again/, what);
    t.equal(await contentOf(result), await contentOf(fresh), what);
    t.ok(readFileSync(entry).equals(good), `${what}: repaired`);
  }
  t.same(
    files().filter((name) => name.startsWith('.')),
    [],
    'no temporary file stays',
  );

  // A file that outgrows memory while it is encoded becomes the cached file.
  process.env.QLORA_CACHE = join(dir, 'cache2');
  const spilled = await encode(path, { memoryBytes: 2000, threadsFrom: 0 });
  t.ok(spilled.rows.inFile);
  const reread = await encode(path, { memoryBytes: 2000, check: () => t.fail('encoded anew') });
  t.equal(await contentOf(reread), await contentOf(spilled));
  t.equal(readdirSync(join(dir, 'cache2')).length, 1);
  await spilled.rows.close();
  await reread.rows.close();

  process.env.QLORA_CACHE = 'off';
  let checked = 0;
  const count = { limit: 300, check: () => checked++ };
  await encode(path, count);
  await encode(path, count);
  t.equal(checked, 600, 'off is off');
  mkdirSync(join(dir, 'file'));
  writeFileSync(join(dir, 'file', 'x'), '');
  process.env.QLORA_CACHE = join(dir, 'file', 'x');
  const { result, lines: said } = await logged(() => encode(path, { limit: 300 }));
  t.equal(await contentOf(result), await contentOf(fresh), 'rows are as good where they cannot be kept');
  t.match(said.join('\n'), /warn: encoded rows were not kept/);
});

t.test('rows with nothing to train are all named', async (t) => {
  const silent: Row[] = Array.from({ length: 30 }, (_, i) => ({
    inputIds: [i, i],
    labels: i % 2 ? [i, i] : [i, -100],
  }));
  const expected = { code: 'ERR_QLORA_NO_TARGETS', message: /In 15 rows \(row 1, row 3, .*row 19, and 5 more\)/ };
  await t.rejects(encode(silent), expected as unknown as Error);
  await t.rejects(encode(silent.slice(0, 2)), {
    message: /In row 1 there is no token to train/,
    detail: { rows: [1], count: 1 },
  });
});

t.test('stores: one behind the other, chosen rows', async (t) => {
  const one = (id: number) => ({
    ids: Int32Array.of(id, id),
    labels: Int32Array.of(-100, id),
    truncated: 0,
    cut: { source: 0, target: 0 },
  });
  const store = new ConcatenatedRows([new MemoryRows([one(1), one(2)]), new MemoryRows([]), new MemoryRows([one(3)])]);
  const ids = async (rows: { rows(i: number[]): Promise<EncodedRow[]> }, at: number[]) =>
    (await rows.rows(at)).map((row) => row.ids[0]);
  t.equal(store.count, 3);
  t.same(await ids(store, [2, 0, 1, 2]), [3, 1, 2, 3]);
  t.same([store.tokens(2), store.targets(1)], [2, 1]);
  const chosen = new SelectedRows(store, Uint32Array.of(2, 2, 0));
  t.same(await ids(chosen, [0, 1, 2]), [3, 3, 1]);
  t.same([chosen.count, chosen.tokens(0), chosen.targets(2)], [3, 2, 1]);
});

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
  t.match(preflightFacts(report), {
    rows: 10,
    'rows cut': '1 (10.0%)',
    'rows equal to earlier ones': '3: 3 (as 1), 7 (as 1), 2 (as 6)',
    'rows with a blank answer': '2: 4, 5',
    'source 2': 'using 3 of 75,000 rows of two',
  });
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
  t.match(text, /\[ ?the city/);
  t.notOk(text.includes('\u001b') || text.includes('\u202e'), 'a row cannot steer the terminal');
  t.match(text, '\\u{1b}[2J');
  const coloured = renderExplanation(second, 'ansi');
  t.ok(coloured.includes('\u001b[32m') && coloured.includes('\u001b[31;9m'));
  t.match(renderExplanation(second, 'plain'), /\{-.* more \.\.\. .*-\}/s);
  t.match(renderExplanation(third, 'plain'), /NOTHING is trained/);
  const limited = [];
  for await (const row of explainFile(join(dir, 'a.jsonl'), llama.directory, { ...options, limit: 1 }))
    limited.push(row);
  t.equal(limited.length, 1);
});

function explainText(ids: number[]): string {
  return ids.map((id) => Buffer.from(llama.surface(id)).toString()).join('');
}

t.test('a trainer over several files', async (t) => {
  const dir = t.testdir({
    cache: {},
    'a.csv': `instruction,output\n${Array.from({ length: 40 }, (_, i) => `Double ${i}.,${2 * i}`).join('\n')}\nDouble 1.,2\n`,
    'b.jsonl': Array.from({ length: 12 }, (_, i) =>
      JSON.stringify({ prompt: `${i} + 1 = `, completion: `${i + 1}` }),
    ).join('\n'),
  });
  useCache(t, join(dir, 'cache'));
  const model = join(packageRoot(), 'examples', 'demo', 'model');
  const options = {
    model,
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
  t.match(trainer.preflight, { rows: 51, duplicates: { count: 1, rows: [{ row: 41, sameAs: { row: 2 } }] } });
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
