/** Rows tokenized once: in slices and in threads, in memory and in files, and from the cache. */
import { createHash } from 'node:crypto';
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { cp } from 'node:fs/promises';
import { join } from 'node:path';
import t from 'tap';
import { type EncodedRow, encodeRow } from '../../lib/data/encode.js';
import { type EncodedSource, encodeSource } from '../../lib/data/encode-source.js';
import { ConcatenatedRows, MemoryRows, SelectedRows } from '../../lib/data/row-store.js';
import type { Row } from '../../lib/data/rows.js';
import { Tokenizer } from '../../lib/tokenizer/tokenizer.js';
import { encode, instruction, llama, logged, useCache } from '../support/data.js';

t.setTimeout(600_000); // a busy machine is slow

const many: Row[] = Array.from({ length: 400 }, (_, i) => instruction(i));
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
