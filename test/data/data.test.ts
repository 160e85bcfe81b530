import { join } from 'node:path';
import t from 'tap';
import { collate, shiftLabels } from '../../lib/data/batch.js';
import { type EncodeOptions, encodeRow } from '../../lib/data/encode.js';
import { explainRow } from '../../lib/data/explain.js';
import { randomBits, shuffledOrder, splitRows } from '../../lib/data/order.js';
import { type DatasetSource, readRows } from '../../lib/data/read-rows.js';
import { formatNames, type Row, toRow } from '../../lib/data/rows.js';
import { promptTemplate, questionIn, questionOf } from '../../lib/data/templates.js';
import type { ChatTurn } from '../../lib/tokenizer/chat-template.js';
import { Tokenizer } from '../../lib/tokenizer/tokenizer.js';
import { readJson, referencesDir } from '../support/references.js';

interface AlpacaCase {
  variant: string;
  tokenizer: string;
  row: string;
  sourceMaxLength: number;
  targetMaxLength: number;
  prompt: string;
  ids: number[];
  labels: number[];
  cut: [number, number];
}

const folder = referencesDir('tokenizers');
const load = (name: string): Promise<Tokenizer> => Tokenizer.load(join(folder, name));
const VARIANTS: Record<string, string | undefined> = {
  qlora: undefined,
  'lit-gpt': 'alpaca-lit-gpt',
  'llama-factory': 'alpaca-llama-factory',
};

async function all(source: DatasetSource, format?: string): Promise<Row[]> {
  const rows: Row[] = [];
  for await (const { row } of readRows(source, { format })) rows.push(row);
  return rows;
}

t.test("Alpaca's three variants: prompts, ids, labels and cuts", async (t) => {
  const { rows, cases } = readJson<{ rows: Record<string, Row>; cases: AlpacaCase[] }>(folder, 'alpaca.json');
  t.ok(cases.length > 100);
  for (const c of cases) {
    const label = `${c.variant} ${c.tokenizer} ${c.row} ${c.sourceMaxLength}`;
    const row = rows[c.row] as { instruction: string; input?: string; output: string };
    const { source, tail } = promptTemplate(VARIANTS[c.variant]);
    t.equal(source(row) + tail, c.prompt, `${label}: prompt`);
    t.equal(questionIn(c.prompt.trim()).trim(), questionOf(row).trim(), `${label}: what it asks`);
    const { sourceMaxLength, targetMaxLength } = c;
    const options = { template: VARIANTS[c.variant], sourceMaxLength, targetMaxLength };
    const encoded = encodeRow(row, await load(c.tokenizer), options);
    t.same([...encoded.ids], c.ids, `${label}: ids`);
    t.same([...encoded.labels], c.labels, `${label}: labels`);
    t.same([encoded.cut.source, encoded.cut.target], c.cut, `${label}: cut`);
    t.equal(encoded.truncated, c.cut[0] + c.cut[1], `${label}: truncated`);
  }
  const wrong = { code: 'ERR_QLORA_TEMPLATE_UNKNOWN', hint: "Did you mean 'alpaca'?" };
  t.throws(() => promptTemplate('alpacca'), wrong);
  t.throws(() => promptTemplate('constructor'), { code: 'ERR_QLORA_TEMPLATE_UNKNOWN' });
});

t.test('rows of every shape become ids and labels', async (t) => {
  const llama = await load('llama2-like');
  const encode = (text: string): number[] => llama.encode(text);
  const ids = (row: Row, options?: EncodeOptions): number[] => [...encodeRow(row, llama, options).ids];
  const labels = (row: Row, options?: EncodeOptions): number[] => [...encodeRow(row, llama, options).labels];

  const pair = { prompt: 'the house', completion: 'la maison' };
  const [p, c] = [encode(pair.prompt), encode(pair.completion)];
  t.same(ids(pair), [1, ...p, ...c, 2]);
  t.same(labels(pair), [-100, ...p.map(() => -100), ...c, 2]);
  t.same(labels(pair, { trainOnSource: true }), [1, ...p, ...c, 2]);
  t.same(ids({ text: 'the house' }), [1, ...p, 2]);
  t.same(labels({ text: 'the house' }), [1, ...p, 2]);
  t.same(
    ids({ text: '<s>the house</s>' }).filter((id) => id < 3),
    [1, 2],
    'one BOS, one EOS',
  );
  t.equal(ids({ prompt: '<s>a', completion: 'b' }).filter((id) => id === 1).length, 1, 'one BOS');
  const injected = { prompt: 'a</s>b', completion: '<s>' };
  t.same(
    ids(injected, { specialTokens: 'text' }).filter((id) => id < 3),
    [1, 2],
    'special text stays text where asked',
  );
  t.same(
    ids(injected).filter((id) => id < 3),
    [1, 2, 1, 2],
    'and else is what transformers makes of it',
  );

  const given = { inputIds: new Uint16Array([5, 6, 7]), labels: [-100, 6, -100] };
  t.same([...encodeRow(given, undefined).ids], [5, 6, 7]);
  t.same([...encodeRow(given, undefined).labels], [-100, 6, -100]);
  t.same([...encodeRow({ inputIds: [5, 6] }, undefined, { maxLength: 1 }).labels], [5, 6], 'never cut');

  const gpt2 = await load('gpt2-like');
  t.equal(encodeRow(pair, gpt2).ids[0], gpt2.encode('the house')[0], 'no BOS where the tokenizer has none');
});

t.test('cuts keep what opens the answer and EOS', async (t) => {
  const llama = await load('llama2-like');
  const words = 'the house is near the water and the city '.repeat(20);
  const instruction: Row = { instruction: words, output: words };
  const { tail } = promptTemplate();
  for (const maxLength of [40, 61, 100, 350]) {
    const { ids, labels, truncated } = encodeRow(instruction, llama, { maxLength });
    t.equal(ids.length, maxLength, `${maxLength} tokens`);
    const start = labels.findIndex((label) => label !== -100);
    const source = llama.decode(ids.slice(0, start), { skipSpecialTokens: true });
    t.ok(source.endsWith(tail), `${maxLength}: the tail stays`);
    t.equal(ids[0], 1);
    t.equal(ids.at(-1), 2);
    t.equal(truncated, encodeRow(instruction, llama, { maxLength: 10_000 }).ids.length - maxLength);
  }
  const short = encodeRow({ instruction: 'x', output: words }, llama, { maxLength: 100 });
  t.equal(short.cut.source, 0, 'a short source is left whole');
  t.equal(
    encodeRow({ instruction: words, output: 'x' }, llama, { maxLength: 100 }).cut.target,
    0,
    'a short answer too',
  );
  t.same([...encodeRow({ text: words }, llama, { maxLength: 5 }).ids].at(-1), 2, 'text keeps EOS');
  t.equal(encodeRow({ text: words }, llama, { maxLength: 5 }).ids.length, 5);
  const room = { code: 'ERR_QLORA_MAX_LENGTH', message: /row 7/i, hint: /./ };
  t.throws(() => encodeRow(instruction, llama, { sourceMaxLength: 5 }, { row: 7 }), room);
  t.throws(() => encodeRow(instruction, llama, { maxLength: 9 }, { row: 7 }), room);
  t.throws(() => encodeRow(instruction, llama, { targetMaxLength: 1 }, { row: 7 }), room);
  t.throws(() => encodeRow(instruction, llama, { maxLength: 0.5 }), { code: 'ERR_QLORA_OPTION_INVALID' });
});

t.test('conversations train what the assistant says', async (t) => {
  const gpt2 = await load('gpt2-like');
  const chat = readJson<{ conversations: Record<string, ChatTurn[]>; cases: Record<string, unknown>[] }>(
    folder,
    'chat.json',
  );
  const messages = chat.conversations.many as { role: 'user'; content: string }[];
  const same = chat.cases.find(
    (c) => c.template === 'chatml' && c.conversation === 'many' && c.addGenerationPrompt === false,
  );
  const whole = explainRow({ messages }, gpt2);
  t.same(whole.ids, same?.ids);
  t.same(
    whole.trained,
    ((same?.trained ?? []) as number[]).map((bit) => bit === 1),
  );
  t.ok(whole.tokens.join('').startsWith('<|im_start|>system\nYou are  precise.'), 'tokens read as the text');

  const runs = (trained: boolean[]): number => trained.filter((bit, i) => bit && !trained[i - 1]).length;
  t.equal(runs(whole.trained), 3);
  const last = explainRow({ messages }, gpt2, { maskHistory: true });
  t.equal(runs(last.trained), 1);
  t.equal(last.trained.lastIndexOf(true), whole.trained.lastIndexOf(true), 'the last turn is the one');
  t.ok(explainRow({ messages }, gpt2, { trainOnSource: true }).trained.every(Boolean));

  const ends = whole.trained.flatMap((bit, i) => (bit && !whole.trained[i + 1] ? [i + 1] : []));
  const two = explainRow({ messages }, gpt2, { maxLength: (ends[2] as number) - 1 });
  t.equal(two.ids.length, ends[1], 'it ends with the last turn that fits');
  t.equal(two.truncated, whole.ids.length - (ends[1] as number));
  const tight = explainRow({ messages }, gpt2, { maxLength: (ends[0] as number) - 10 });
  t.equal(tight.ids.length, (ends[0] as number) - 10);
  t.match(
    gpt2.decode(tight.ids),
    /<\|im_end\|>\n<\|im_start\|>assistant\n[^<]*<\|im_end\|>\n$/,
    'what opens and closes it stays',
  );

  const unanswered: Row = { messages: [{ role: 'user', content: 'x' }] };
  const where = { row: 3, file: 'a.jsonl', line: 4 };
  const none = { code: 'ERR_QLORA_NO_TARGETS', message: /row 3 of a\.jsonl \(line 4\)/, detail: where, hint: /./ };
  t.throws(() => encodeRow(unanswered, gpt2, {}, where), none);
  t.throws(() => encodeRow({ inputIds: [1, 2], labels: [1, -100] }, undefined, {}, where), none);
  t.throws(() => encodeRow({ inputIds: [1] }, undefined, {}, where), none);
  t.throws(() => encodeRow({ text: 'x' }, undefined, {}, where), {
    code: 'ERR_QLORA_TOKENIZER_MISSING',
    message: /Row 3/,
  });
});

t.test('data formats', async (t) => {
  const at = { row: 1 };
  const answer = { prompt: 'q', completion: 'a' };
  const talk = [
    { role: 'user', content: 'q' },
    { role: 'assistant', content: 'a' },
  ];
  const shared = [
    { from: 'human', value: 'q' },
    { from: 'gpt', value: 'a' },
  ];
  const table: [string, Record<string, unknown>, Row][] = [
    ['alpaca', { instruction: 'q', input: 'i', output: 'a', text: 'x' }, { instruction: 'q', input: 'i', output: 'a' }],
    [
      'alpaca-clean',
      { instruction: 'q', input: null, output: 'a' },
      { instruction: 'q', input: undefined, output: 'a' },
    ],
    ['dolly', { instruction: 'q', context: 'i', response: 'a' }, { instruction: 'q', input: 'i', output: 'a' }],
    ['prompt-completion', answer, answer],
    ['self-instruct', answer, answer],
    ['input-output', { input: 'q', output: 'a' }, answer],
    ['longform', { input: 'q', output: 'a' }, answer],
    ['csv', { instruction: 'q', input: '', output: 'a' }, { instruction: 'q', input: '', output: 'a' }],
    ['tsv', { input: 'q', output: 'a' }, answer],
    ['hh-rlhf', { chosen: 'a', rejected: 'b' }, { prompt: '', completion: 'a' }],
    ['oasst1', { text: 'a' }, { prompt: '', completion: 'a' }],
    ['chip2', { text: '<human>: q\n<bot>: a\n<bot>: b' }, { prompt: 'q', completion: 'a\n<bot>: b' }],
    ['text', { text: 'a' }, { text: 'a' }],
    ['messages', { messages: talk }, { messages: talk } as Row],
    ['openai', { messages: talk }, { messages: talk } as Row],
    ['sharegpt', { conversations: shared }, { messages: talk } as Row],
    ['sharegpt', { messages: talk }, { messages: talk } as Row],
    ['input-ids', { input_ids: [1, 2], labels: [-100, 2] }, { inputIds: [1, 2], labels: [-100, 2] }],
  ];
  const chosen = new Set(['oasst1', 'chip2']);
  for (const [format, record, row] of table) {
    t.same(toRow(record, at, format), row, format);
    if (!chosen.has(format)) t.same(toRow(record, at), row, `${format} is inferred`);
  }
  t.same([...new Set(table.map(([format]) => format))].sort(), formatNames().sort(), 'each format is tried');

  const hints: [object, RegExp][] = [
    [{ question: 'q', answer: 'a' }, /^Rename question to instruction and answer to output\.$/],
    [{ id: 1, instruction: 'q', Response: 'a' }, /^Rename Response to output\.$/],
    [{ Prompt: 'q', notes: '' }, /datasetFormat/],
  ];
  for (const [record, hint] of hints) t.throws(() => toRow(record, at), { code: 'ERR_QLORA_ROW_INVALID', hint });

  const place = { row: 3, file: 'd.jsonl', line: 5 };
  const wrong: [unknown, RegExp, string?][] = [
    [{ question: 'q', answer: 'a' }, /fields found: question, answer; expected: .*instruction \+ output/],
    [{ instruction: 'q', input: '' }, /: output is missing; .*expected: instruction \+ output$/],
    [{ prompt: 'q' }, /: completion is missing/],
    [{}, /fields found: none/],
    ['text', /must be an object, it is a string/],
    [null, /must be an object, it is null/],
    [[1], /must be an object, it is a list/],
    [{ instruction: 'q', output: 42 }, /output must be a string, it is a number/],
    [{ instruction: 'q', input: {}, output: 'a' }, /input must be a string, it is an object/],
    [{ text: 'x' }, /instruction must be a string, it is missing/, 'alpaca'],
    [{ text: 'no bot' }, /<bot>/, 'chip2'],
    [{ messages: [] }, /messages must be a list that is not empty, it is an empty list/],
    [{ messages: [{ role: 'robot', content: '' }] }, /messages\[0\]\.role must be one of .*assistant.*, it is 'robot'/],
    [{ messages: [{ role: 'user', content: null }] }, /messages\[0\]\.content must be a string, it is null/],
    [{ messages: [{ role: 'toString', content: '' }] }, /role/],
    [{ inputIds: 'x' }, /inputIds must be a list/],
    [{ inputIds: [] }, /inputIds is empty/],
    [{ inputIds: [1, -1] }, /inputIds\[1\] must be a token id, it is -1/],
    [{ inputIds: [1.5] }, /inputIds\[0\]/],
    [{ inputIds: [2 ** 31] }, /inputIds\[0\]/],
    [{ inputIds: [1, 2], labels: [1] }, /labels has 1 entries and inputIds 2/],
    [{ inputIds: [1], labels: [-1] }, /labels\[0\] must be a token id or -100/],
  ];
  for (const [record, message, format] of wrong) {
    const expected = { code: 'ERR_QLORA_ROW_INVALID', message, hint: String, detail: place };
    t.throws(() => toRow(record, place, format), expected, String(message));
    t.throws(() => toRow(record, place, format), { message: /^Row 3 of d\.jsonl \(line 5\) / });
  }
  t.throws(() => toRow({}, place, 'alpaka'), { code: 'ERR_QLORA_DATASET_FORMAT', hint: "Did you mean 'alpaca'?" });
});

t.test('files, folders and iterables are read', async (t) => {
  const many = Array.from({ length: 3000 }, (_, i) => JSON.stringify({ text: `zeile ${i} \u2028 ü 😀`.repeat(20) }));
  const dir = t.testdir({
    'array.json': '[{"text":"a"},{"text":"b"}]',
    'bom.json': '\ufeff{"data":[{"text":"a"}],"other":1}',
    'lines.json': '\ufeff{"text":"a"}\n{"text":"b"}\n',
    'object.json': '{"text":"a"}',
    'broken.json': '[{"text":"a"},',
    'crlf.jsonl': '\ufeff{"text":"a"}\r\n\r\n   \r\n{"text":"b\\r\\n"}',
    'raw-separator.jsonl': '{"text":"a\u2028b\u0085"}\n{"text":"c"}\n',
    'broken.jsonl': '{"text":"a"}\n\n{"text":\n{"text":"b"}\n',
    'row.jsonl': '{"text":"a"}\n\n{"txt":"b"}\n',
    'many.jsonl': many.join('\n'),
    'empty.jsonl': '',
    'table.xlsx': 'a,b',
    folder: {
      'b.jsonl': '{"text":"3"}',
      'a.json': '[{"text":"1"},{"text":"2"}]',
      'README.md': '',
      '.hidden.json': 'x',
      'dataset_info.json': '{}',
    },
    tables: { 'x.arrow': '' },
    nothing: {},
  });
  const at = (name: string): string => join(dir, name);
  const texts = async (source: DatasetSource): Promise<string[]> =>
    (await all(source)).map((row) => ('text' in row ? row.text : ''));
  t.same(await texts(at('array.json')), ['a', 'b']);
  t.same(await texts(at('bom.json')), ['a']);
  t.same(await texts(at('lines.json')), ['a', 'b'], 'one object a line, whatever the name');
  t.same(await texts(at('crlf.jsonl')), ['a', 'b\r\n']);
  t.same(await texts(at('raw-separator.jsonl')), ['a\u2028b\u0085', 'c']);
  t.same(await texts(at('empty.jsonl')), []);
  t.same(await texts(at('folder')), ['1', '2', '3']);
  t.same(
    await texts(at('many.jsonl')),
    many.map((line) => (JSON.parse(line) as { text: string }).text),
    'characters across chunks',
  );
  t.same(await texts([{ text: 'x' }]), ['x']);
  t.same(await texts(new Set([{ text: 'x' }])), ['x']);
  async function* later(): AsyncGenerator<Row> {
    yield { text: 'x' };
    yield { text: 'y' };
  }
  t.same(await texts(later()), ['x', 'y']);
  const places: unknown[] = [];
  for await (const { place } of readRows(at('crlf.jsonl'))) places.push(place);
  t.match(places, [
    { row: 1, line: 1, file: at('crlf.jsonl') },
    { row: 2, line: 4 },
  ]);

  const fails = (source: unknown, expected: object, format?: string): Promise<unknown> =>
    t.rejects(all(source as DatasetSource, format), { hint: /./, ...expected } as unknown as Error);
  await fails(at('none.jsonl'), { code: 'ERR_QLORA_DATASET_NOT_FOUND', message: /none\.jsonl/ });
  await fails(at('array.json/x.json'), { code: 'ERR_QLORA_DATASET_NOT_FOUND' });
  await fails(at('table.xlsx'), { code: 'ERR_QLORA_DATASET_FORMAT', message: /\.xlsx.*\.jsonl/ });
  await fails(at('tables'), { code: 'ERR_QLORA_DATASET_FORMAT', message: /x\.arrow/, hint: /to_parquet/ });
  await fails(at('nothing'), { code: 'ERR_QLORA_DATASET_FORMAT', message: /found nothing/ });
  await fails(at('object.json'), { code: 'ERR_QLORA_DATASET_FORMAT', message: /array/ });
  await fails(at('broken.json'), { code: 'ERR_QLORA_DATASET_INVALID', message: /broken\.json/ });
  await fails(at('broken.jsonl'), { code: 'ERR_QLORA_DATASET_INVALID', message: /line 3 of /, detail: { line: 3 } });
  await fails(at('row.jsonl'), { code: 'ERR_QLORA_ROW_INVALID', message: /Row 2 of .*row\.jsonl \(line 3\).*txt/ });
  await fails([{ text: 'a' }, { txt: 'b' }], { code: 'ERR_QLORA_ROW_INVALID', message: /^Row 2 cannot/ });
  await fails(17, { code: 'ERR_QLORA_DATASET_FORMAT', message: /number/ });
  await fails(null, { code: 'ERR_QLORA_DATASET_FORMAT', message: /null/ });
  await fails(at('none.jsonl'), { code: 'ERR_QLORA_DATASET_FORMAT', hint: /sharegpt/ }, 'sharedgpt');
});

t.test('batches: padding by position, labels that count', async (t) => {
  const long = { ids: Int32Array.of(1, 9, 2, 2), labels: Int32Array.of(-100, 9, 2, 2) };
  const short = { ids: Int32Array.of(1, 2), labels: Int32Array.of(1, 2) };
  const batch = collate([[long], [short]], { padId: 2 });
  t.match(batch, { batch: 2, length: 4 });
  t.same([...batch.tokens], [1, 9, 2, 2, 1, 2, 2, 2]);
  t.same([...batch.labels], [-100, 9, 2, 2, 1, 2, -100, -100], 'EOS counts, padding with the same id does not');
  t.same([...batch.positions], [0, 1, 2, 3, 0, 1, 0, 0]);
  t.same([...batch.segmentIds], [0, 0, 0, 0, 0, 0, -1, -1]);
  t.same([...shiftLabels(batch)], [9, 2, 2, -100, 2, -100, -100, -100]);
  const packed = { batch: 1, length: 4, labels: Int32Array.of(5, 6, 7, 8), segmentIds: Int32Array.of(0, 0, 1, 1) };
  t.same([...shiftLabels(packed)], [6, -100, 8, -100], 'no label of the next segment');
  t.match(collate([]), { batch: 0, length: 0 });
});

t.test('orders follow from seed and epoch', async (t) => {
  const order = (count: number, seed: number, epoch: number): number[] => [...shuffledOrder(count, seed, epoch)];
  const sorted = (list: number[]): number[] => [...list].sort((a, b) => a - b);
  const numbers = Array.from({ length: 500 }, (_, i) => i);
  t.same(sorted(order(500, 7, 0)), numbers, 'nothing lost, nothing twice');
  t.same(order(500, 7, 0), order(500, 7, 0), 'the same again');
  t.notSame(order(500, 7, 0), order(500, 7, 1), 'another epoch');
  t.notSame(order(500, 7, 0), order(500, 8, 0), 'another seed');
  t.notSame(order(500, 2 ** 32, 0), order(500, 0, 0), 'seeds above 32 bits');
  t.same(order(0, 1, 1), []);
  t.same(order(1, 1, 1), [0]);
  // Each of the 24 orders of four comes 1/24 of the time; 4 sigma of a count of 24,000 / 24 is 124.
  const counts = new Map<string, number>();
  for (let epoch = 0; epoch < 24_000; epoch++) {
    const key = order(4, 3, epoch).join('');
    counts.set(key, (counts.get(key) ?? 0) + 1);
  }
  t.equal(counts.size, 24);
  for (const [key, count] of counts) t.ok(Math.abs(count - 1000) < 130, `${key}: ${count}`);
  t.equal(randomBits(1, 2, 3), randomBits(1, 2, 3));
  t.not(randomBits(1, 2, 3), randomBits(1, 3, 2));

  for (const [size, expected] of [
    [0.1, 50],
    [0.0001, 1],
    [40, 40],
    [1, 1],
  ] as const) {
    const split = splitRows(500, size, 5);
    t.equal(split.eval.length, expected, `${size} of 500`);
    t.same(sorted([...split.train, ...split.eval]), numbers, 'together they are all');
    t.same([...split.train], sorted([...split.train]), 'in the order of the data');
  }
  t.same(splitRows(500, 40, 5), splitRows(500, 40, 5));
  t.notSame(splitRows(500, 40, 5).eval, splitRows(500, 40, 6).eval);
  for (const size of [0, -1, 1.5, 500, 501, Number.NaN, Number.POSITIVE_INFINITY]) {
    t.throws(() => splitRows(500, size, 5), { code: 'ERR_QLORA_EVAL_SPLIT', hint: /./ }, `${size} of 500`);
  }
  t.throws(() => splitRows(1, 0.5, 5), { code: 'ERR_QLORA_EVAL_SPLIT' }, 'nothing would be left');
});
