/** Files and folders of rows, whole and damaged, from friends and from strangers. */
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { gzipSync } from 'node:zlib';
import t, { type Test } from 'tap';
import { dataFiles } from '../../lib/data/data-files.js';
import { matchesPattern } from '../../lib/data/glob.js';
import { type ReadReport, readRows } from '../../lib/data/read-rows.js';
import type { LocatedRow, Row } from '../../lib/data/rows.js';
import { setLogger } from '../../lib/index.js';

// tap's loader does not resolve what this package imports; require does not go through it.
const { parquetWriteBuffer } = createRequire(import.meta.url)('hyparquet-writer') as typeof import('hyparquet-writer');

t.setTimeout(600_000); // a busy machine is slow

const all = async (path: string, format?: string, limit?: number, report?: ReadReport): Promise<LocatedRow[]> => {
  const rows: LocatedRow[] = [];
  for await (const row of readRows(path, { format, limit, report })) rows.push(row);
  return rows;
};
const rowsOf = async (path: string, format?: string): Promise<Row[]> => (await all(path, format)).map(({ row }) => row);

/** A folder with these files. */
function folderOf(t: Test, files: Record<string, string | Uint8Array>): (name: string) => string {
  const root = t.testdir({});
  for (const [name, content] of Object.entries(files)) {
    mkdirSync(dirname(join(root, name)), { recursive: true });
    writeFileSync(join(root, name), content);
  }
  return (name) => join(root, name);
}

async function logged<T>(work: () => Promise<T>): Promise<string[]> {
  const lines: string[] = [];
  setLogger((_, message) => lines.push(message));
  try {
    await work();
  } finally {
    setLogger(null);
  }
  return lines;
}

function parquet(columns: Record<string, unknown[]>, options: object = {}): Uint8Array {
  const columnData = Object.entries(columns).map(([name, data]) => ({ name, data }));
  return new Uint8Array(parquetWriteBuffer({ columnData, ...options } as never));
}

const fails = (t: Test, path: string, expected: object, format?: string) =>
  t.rejects(all(path, format), { hint: /./, ...expected } as unknown as Error, path);

t.test('tables', async (t) => {
  const at = folderOf(t, {
    'alpaca.csv': '\ufeffinstruction,input,output\r\n"Add, please",,"a ""b""\nc"\r\n\r\nq,i,a\r\n',
    'pairs.tsv': 'input\toutput\textra\nq\t a "b" c\tx\n',
    'one.csv': 'text\nhello\n',
    'proto.csv': '__proto__,constructor,text\nx,y,z\n',
    'cut.csv': 'input,output\nq,a\nq,"a\nb\nc',
    'short.csv': 'input,output\nq,a\nq\n',
    'twice.csv': 'input,output,input\nq,a,b\n',
    'latin.csv': Buffer.from('input,output\nq,a\nq,caf\xe9\n', 'latin1'),
    'utf16.csv': Buffer.from('\ufeffinput,output\nq,a\n', 'utf16le'),
    'other.csv': 'a,b\n1,2\n',
    'header.csv': 'input,output\n',
    'empty.csv': '',
    'semicolons.csv': 'question;answer\nOne, two, and?;three\n',
    'commas.tsv': 'question,answer\nq,a\n',
  });
  t.same(await rowsOf(at('alpaca.csv')), [
    { instruction: 'Add, please', input: '', output: 'a "b"\nc' },
    { instruction: 'q', input: 'i', output: 'a' },
  ]);
  t.same(await rowsOf(at('alpaca.csv'), 'csv'), await rowsOf(at('alpaca.csv')));
  t.same(await rowsOf(at('pairs.tsv')), [{ prompt: 'q', completion: ' a "b" c' }]);
  t.same(await rowsOf(at('pairs.tsv'), 'tsv'), [{ prompt: 'q', completion: ' a "b" c' }]);
  t.same(await rowsOf(at('one.csv')), [{ text: 'hello' }]);
  t.same(await rowsOf(at('proto.csv')), [{ text: 'z' }]);
  t.same(({} as { x?: unknown }).x, undefined);
  t.same(await rowsOf(at('header.csv')), []);
  t.same(await rowsOf(at('empty.csv')), []);
  const [, second] = await all(at('alpaca.csv'));
  t.match(second?.place, { row: 2, line: 5, file: at('alpaca.csv') });
  await fails(t, at('cut.csv'), { code: 'ERR_QLORA_DATASET_INVALID', message: /line 5 of .*cut\.csv.*Quote/ });
  await fails(t, at('short.csv'), { code: 'ERR_QLORA_DATASET_INVALID', message: /line 3 of .*short\.csv/ });
  await fails(t, at('twice.csv'), { code: 'ERR_QLORA_DATASET_INVALID', message: /line 1 .*'input' twice/ });
  await fails(t, at('latin.csv'), { code: 'ERR_QLORA_DATASET_INVALID', message: /UTF-8/, hint: /CSV UTF-8/ });
  await fails(t, at('utf16.csv'), { code: 'ERR_QLORA_DATASET_INVALID', message: /UTF-8 at line 1/ });
  const separated = (message: RegExp) => ({ code: 'ERR_QLORA_DATASET_FORMAT', message, hint: /between the columns/ });
  await fails(t, at('semicolons.csv'), separated(/semicolons\.csv are separated by ';', not by ','$/));
  await fails(t, at('commas.tsv'), separated(/commas\.tsv are separated by ',', not by tabs$/));
  await fails(t, at('other.csv'), { code: 'ERR_QLORA_ROW_INVALID', message: /fields found: a, b/ });
});

t.test('JSON in pieces', async (t) => {
  const long = Array.from({ length: 3000 }, (_, i) => ({ text: `${i} "\\\u2028 [{]}, ü😀`.repeat(30) }));
  const at = folderOf(t, {
    'long.json': JSON.stringify({ data: long }, null, 2),
    'nested.json': '{"a":{"data":[{"text":"no"}]},"x":"data","data":\n[{"text":"yes","y":[1,{"z":"]"}]}],"b":[{}]}',
    'quote.json': '[{"text":"a \\" ], [ b"},{"text":"\\\\"}]',
    'none.json': '[]',
    'blank.json': ' [ ] ',
    'comma.json': '[{"text":"a"},]',
    'two.json': '[{"text":"a"},,{"text":"b"}]',
    'cut.json': '[{"text":"a"},\n{"text":"b"',
    'bad.json': '[{"text":"a"},\n\n{"text":nope}]',
    'behind.json': '[{"text":"a"}] x',
    'string.json': '"abc"',
    'bytes.json': Buffer.from([0x5b, 0x7b, 0x22, 0xff, 0x22, 0x3a, 0x31, 0x7d, 0x5d]),
    'deep.json': `[{"text":"a","b":${'['.repeat(100_000)}${']'.repeat(100_000)}}]`,
    'deep.jsonl': `{"text":"a","b":${'['.repeat(100_000)}${']'.repeat(100_000)}}\n`,
    'proto.jsonl': '{"__proto__":{"text":"x","polluted":1}}\n',
    'binary.jsonl': Buffer.from([0, 1, 2, 255, 254, 10, 7]),
  });
  t.same(await rowsOf(at('long.json')), long);
  t.same(await rowsOf(at('nested.json')), [{ text: 'yes' }]);
  t.same(await rowsOf(at('quote.json')), [{ text: 'a " ], [ b' }, { text: '\\' }]);
  t.same(await rowsOf(at('none.json')), []);
  t.same(await rowsOf(at('blank.json')), []);
  t.match((await all(at('long.json')))[1]?.place, { row: 2, line: 6 });
  const invalid = (message: RegExp) => ({ code: 'ERR_QLORA_DATASET_INVALID', message });
  await fails(t, at('comma.json'), invalid(/line 1/));
  await fails(t, at('two.json'), invalid(/line 1/));
  await fails(t, at('cut.json'), invalid(/line 2 .*cut short/));
  await fails(t, at('bad.json'), invalid(/line 3 .*not JSON/));
  await fails(t, at('behind.json'), invalid(/follows the end/));
  await fails(t, at('string.json'), { code: 'ERR_QLORA_DATASET_FORMAT' });
  await fails(t, at('bytes.json'), invalid(/UTF-8/));
  await fails(t, at('deep.json'), invalid(/deeper than 1000/));
  t.same(await rowsOf(at('deep.jsonl')), [{ text: 'a' }]);
  await fails(t, at('proto.jsonl'), { code: 'ERR_QLORA_ROW_INVALID', message: /fields found: __proto__/ });
  t.notOk('polluted' in {});
  await fails(t, at('binary.jsonl'), invalid(/line 1/));
});

t.test('gzip', async (t) => {
  const lines = Array.from({ length: 20_000 }, (_, i) => JSON.stringify({ text: `row ${i}` })).join('\n');
  const zipped = gzipSync(lines);
  const bomb = gzipSync(Buffer.alloc(2 ** 27, 0x61));
  const at = folderOf(t, {
    'a.jsonl.gz': zipped,
    'a.json.gz': gzipSync('[{"text":"a"}]'),
    'a.csv.gz': gzipSync('text\na\n'),
    'A.TSV.GZ': gzipSync('text\tx\na\tb\n'),
    'cut.jsonl.gz': zipped.subarray(0, zipped.length / 2),
    'none.jsonl.gz': Buffer.from('{"text":"a"}\n'),
    'flip.jsonl.gz': Buffer.from(zipped).fill(0xaa, 5000, 5010),
    'bomb.jsonl.gz': bomb,
    'bomb.json.gz': gzipSync(Buffer.concat([Buffer.from('["'), Buffer.alloc(2 ** 27, 0x61)])),
    'bomb.csv.gz': gzipSync(Buffer.concat([Buffer.from('text\n"'), Buffer.alloc(2 ** 27, 0x61)])),
    'a.parquet.gz': gzipSync('x'),
  });
  t.equal((await all(at('a.jsonl.gz'))).length, 20_000);
  t.same(await rowsOf(at('a.json.gz')), [{ text: 'a' }]);
  t.same(await rowsOf(at('a.csv.gz')), [{ text: 'a' }]);
  t.same(await rowsOf(at('A.TSV.GZ')), [{ text: 'a' }]);
  await fails(t, at('cut.jsonl.gz'), { code: 'ERR_QLORA_DATASET_INVALID', message: /cut\.jsonl\.gz.*cut short/ });
  await fails(t, at('none.jsonl.gz'), { code: 'ERR_QLORA_DATASET_INVALID', message: /compression/ });
  await fails(t, at('flip.jsonl.gz'), { code: 'ERR_QLORA_DATASET_INVALID' });
  await fails(t, at('bomb.jsonl.gz'), { code: 'ERR_QLORA_DATASET_FORMAT', message: /longer than 67108864/ });
  await fails(t, at('bomb.json.gz'), { code: 'ERR_QLORA_DATASET_FORMAT', message: /longer than 67108864/ });
  await fails(t, at('bomb.csv.gz'), { code: 'ERR_QLORA_DATASET_INVALID', message: /exceed/i });
  await fails(t, at('a.parquet.gz'), { code: 'ERR_QLORA_DATASET_FORMAT' });
});

t.test('parquet', async (t) => {
  const count = 700;
  const text = Array.from({ length: count }, (_, i) => `row ${i} ü`);
  const messages = text.map((content) => [
    { role: 'user', content },
    { role: 'assistant', content: 'a' },
  ]);
  const whole = parquet({ instruction: text, output: text, score: text.map((_, i) => i) }, { rowGroupSize: 250 });
  const at = folderOf(t, {
    'a.parquet': whole,
    'chat.parquet': parquet({ messages }),
    'ids.parquet': parquet({ input_ids: [[1, 2, 3].map(BigInt), [4, 5].map(BigInt)], other: ['x', 'y'] }),
    'other.parquet': parquet({ a: ['x'], b: ['y'] }),
    'cut.parquet': whole.subarray(0, whole.length - 500),
    'empty.parquet': '',
    'text.parquet': 'PAR1 this is no parquet file PAR1',
  });
  const rows = await all(at('a.parquet'));
  t.same(
    rows.map(({ row }) => row),
    text.map((line) => ({ instruction: line, input: undefined, output: line })),
  );
  t.match(rows[699]?.place, { row: 700, file: at('a.parquet'), line: undefined });
  t.same(
    await rowsOf(at('chat.parquet')),
    messages.map((list) => ({ messages: list })),
  );
  t.same(await rowsOf(at('ids.parquet')), [{ inputIds: [1, 2, 3] }, { inputIds: [4, 5] }]);
  const report: ReadReport = {};
  t.equal((await all(at('a.parquet'), undefined, 10, report)).length, 10);
  t.equal(report.total, count, 'the rest is counted');
  await fails(t, at('other.parquet'), { code: 'ERR_QLORA_ROW_INVALID', message: /fields found: a, b/ });
  for (const name of ['cut', 'empty', 'text']) {
    await fails(t, at(`${name}.parquet`), {
      code: 'ERR_QLORA_DATASET_INVALID',
      message: new RegExp(`${name}\\.parquet`),
    });
  }
  // Any byte may be wrong: an error that says so, or other rows, and never the end of the process.
  let refused = 0;
  for (let i = 0; i < 24; i++) {
    const bytes = Buffer.from(whole);
    const from = i < 16 ? whole.length - 600 : 4;
    for (let k = 0; k < 3; k++) bytes[from + ((i * 37 + k * 11) % 590)] = (i * 61 + k * 97) & 255;
    writeFileSync(at('wrong.parquet'), bytes);
    await all(at('wrong.parquet')).catch(({ code }) => {
      refused++;
      t.match(code, /^ERR_QLORA_(DATASET|ROW)_INVALID$/);
    });
  }
  t.ok(refused > 10, `${refused} of 24 were refused`);
});

t.test("Hugging Face's folders", async (t) => {
  const line = (text: string) => `${JSON.stringify({ text })}\n`;
  const card = (configs: string) => `---\nlicense: mit\nconfigs:\n${configs}---\n# Card\n`;
  const shards = (n: number) =>
    Object.fromEntries(
      [0, 1].map((i) => [`f${n}/data/train-0000${i}-of-00002.parquet`, parquet({ text: [`${n}.${i}`] })]),
    );
  const at = folderOf(t, {
    ...shards(1),
    'f1/data/test-00000-of-00001.parquet': parquet({ text: ['test'] }),
    'f1/dataset_infos.json': '{}',
    'f1/README.md': '# no front matter',
    'f2/train.jsonl': line('train'),
    'f2/test.jsonl': line('test'),
    'f2/validation.jsonl': line('validation'),
    'f3/a.jsonl': line('a'),
    'f3/sub/b.csv': 'text\nb\n',
    'f3/.cache/c.jsonl': line('c'),
    'f4/en/one.jsonl': line('one'),
    'f4/en/two.jsonl': line('two'),
    'f4/de/one.jsonl': line('eins'),
    'f4/README.md': card(
      '- config_name: de\n  data_files: "de/*.jsonl"\n- config_name: en\n  default: true\n  data_files:\n  - split: test\n    path: en/two.jsonl\n  - split: train\n    path: ["en/o*.jsonl"]\n',
    ),
    'f5/test.jsonl': line('test'),
    'f5/dev.jsonl': line('dev'),
    'f6/README.md': card('- data_files: "../../../../../etc/*"\n'),
    'f6/train.jsonl': line('x'),
    'f7/README.md': '---\nconfigs: [\n---\n',
    'f7/train.jsonl': line('x'),
    'f8/README.md': card(`- data_files: "${'*a'.repeat(30)}b"\n`),
    [`f8/${'a'.repeat(200)}.jsonl`]: line('x'),
    'f9/pretrained_latest.jsonl': line('no split in this name'),
  });
  const texts = async (name: string) => (await rowsOf(at(name))).map((row) => ('text' in row ? row.text : ''));
  t.same(await texts('f1'), ['1.0', '1.1']);
  t.same(await texts('f2'), ['train']);
  t.same(await texts('f3'), ['a', 'b']);
  t.same(await texts('f4'), ['one']);
  t.same(await texts('f9'), ['no split in this name']);
  t.match(
    (await logged(() => texts('f2'))).join('\n'),
    /taking the split 'train' of .*f2 \(1 file\); left out: test, validation/,
  );
  t.match((await logged(() => texts('f4'))).join('\n'), /configuration 'en' of .*f4; left out: de/);
  const none = { code: 'ERR_QLORA_DATASET_FORMAT', message: /no split 'train'/ };
  await fails(t, at('f5'), { ...none, message: /only validation, test|only test, validation/ });
  await fails(t, at('f6'), none);
  await fails(t, at('f7'), { code: 'ERR_QLORA_DATASET_FORMAT', message: /no YAML/ });
  await fails(t, at('f8'), none);
  t.same((await dataFiles(at('f2/test.jsonl'))).files, [at('f2/test.jsonl')], 'a file is that file');
  for (const [path, pattern, expected] of [
    ['a/b/c.json', '**/*.json', true],
    ['c.json', '**/*.json', true],
    ['a/c.json', '*.json', false],
    ['a/c.json', './a/?.json', true],
    ['data/train-0.parquet', 'data/train-*', true],
    ['data/sub/train-0.parquet', 'data/train-*', false],
    ['a/b', 'a/**', true],
    ['ab', 'a**b', true],
    ['', '', true],
  ] as const) {
    t.equal(matchesPattern(path, pattern), expected, `${path} and ${pattern}`);
  }
});

t.test('what was read is said, and counted', async (t) => {
  const many = Array.from({ length: 1500 }, (_, i) => JSON.stringify({ text: `${i}` })).join('\n');
  const at = folderOf(t, {
    'a.jsonl': `${many}\n\n`,
    'a.json': `[${many.replaceAll('\n', ',')}]`,
    'mixed.jsonl': '{"text":"a"}\n{"input":"q","output":"a"}\n{"text":"b"}\n',
    'late.jsonl': '{"text":"a"}\n{"text":\n',
  });
  for (const name of ['a.jsonl', 'a.json']) {
    const report: ReadReport = {};
    t.equal((await all(at(name), undefined, 7, report)).length, 7);
    t.equal(report.total, 1500, name);
  }
  const lines = await logged(() => all(at('mixed.jsonl')));
  t.match(lines, [/as 'text', from their fields/, /as 'input-output'/]);
  t.equal(lines.length, 2, 'once a format');
  t.equal((await all(at('late.jsonl'), undefined, 1)).length, 1, 'what is not used need not be right');
  t.match(readFileSync(at('late.jsonl'), 'utf8'), /^\{/);
});
