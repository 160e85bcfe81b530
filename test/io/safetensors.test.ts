/** Reading and writing safetensors: equal to the reference implementation, and safe with files from strangers. */
import { execFileSync } from 'node:child_process';
import { readdirSync, readFileSync, truncateSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import t from 'tap';
import { QLoRAError } from '../../lib/errors.js';
import {
  openSafetensors,
  type SafetensorsItem,
  safetensorsDTypes,
  writeSafetensors,
} from '../../lib/io/safetensors.js';
import { Stream, Tensor } from '../../lib/tensor.js';

const references = fileURLToPath(new URL('../../../test/references/', import.meta.url));
const folder = t.testdir({});
const at = (name: string) => join(folder, name);
const stream = new Stream();
t.teardown(() => stream.close());

/** A file of this header (JSON, or bytes as they are) and this many bytes of data. */
function fileOf(header: unknown, dataBytes = 0, claimed?: bigint): Buffer {
  const text = Buffer.isBuffer(header)
    ? header
    : Buffer.from(typeof header === 'string' ? header : JSON.stringify(header));
  const prefix = Buffer.alloc(8);
  prefix.writeBigUInt64LE(claimed ?? BigInt(text.length));
  return Buffer.concat([prefix, text, Buffer.alloc(dataBytes)]);
}

async function openBytes(bytes: Uint8Array) {
  writeFileSync(at('case.safetensors'), bytes);
  return openSafetensors(at('case.safetensors'));
}

const u8 = (begin: number, end: number, shape: unknown = [end - begin]) => ({
  dtype: 'U8',
  shape,
  data_offsets: [begin, end],
});

t.test('every reference file is read and written again byte for byte', async (t) => {
  const files = readdirSync(references, { recursive: true, encoding: 'utf8' }).filter((f) =>
    f.endsWith('.safetensors'),
  );
  t.ok(files.length > 20);
  for (const name of files) {
    const file = await openSafetensors(join(references, name));
    const items: SafetensorsItem[] = [];
    for (const [key, { dtype, fileDType, shape }] of file.tensors) {
      const data = new Tensor(stream, dtype ?? 'u8', [shape.reduce((a, b) => a * b, 1)], 'scratch');
      file.read(key, data).catch(t.fail);
      items.push({ name: key, dtype: fileDType, shape, data });
    }
    await writeSafetensors(at('again.safetensors'), items.reverse(), Object.fromEntries(file.metadata));
    t.ok(readFileSync(at('again.safetensors')).equals(readFileSync(join(references, name))), name);
    for (const { data } of items) (data as Tensor).dispose();
    file.close();
  }
});

t.test("the npm package 'safetensors' reads what we write", async (t) => {
  // It throws on __metadata__ and on a Buffer that lies in a pool.
  const { SafeTensor } = createRequire(import.meta.url)('safetensors') as { SafeTensor: new (b: Uint8Array) => Reader };
  interface Reader {
    metadata: Map<string, { dtype: string; shape: number[] }>;
    getTensor(name: string): Uint8Array;
  }
  const items: SafetensorsItem[] = [
    { name: 'odd', data: Uint8Array.of(1, 2, 3), dtype: 'U8' },
    { name: 'half', data: Tensor.from(stream, Float32Array.of(1, 2, 3, 4), [2, 2]) },
    { name: 'bits', data: Uint16Array.of(0x3f80), dtype: 'BF16', shape: [1, 1] },
  ];
  await writeSafetensors(at('plain.safetensors'), items, {});
  const theirs = new SafeTensor(new Uint8Array(readFileSync(at('plain.safetensors'))));
  const ours = await openSafetensors(at('plain.safetensors'));
  t.same([...theirs.metadata.keys()], [...ours.tensors.keys()]);
  for (const [name, { fileDType, shape }] of ours.tensors) {
    t.match(theirs.metadata.get(name), { dtype: fileDType, shape });
    t.same(theirs.getTensor(name), await ours.readBytes(name), name);
  }
});

t.test('values, shapes, names and metadata come back', async (t) => {
  const values = Float32Array.of(1.5, -0, 3e-45, 4, 5, 6);
  const name = 'ünï/"\\\u0001\u{1f600}\u2028';
  await writeSafetensors(
    at('a.safetensors'),
    [
      { name: 'empty', data: new Uint8Array(0), dtype: 'I64', shape: [0, 2 ** 52] },
      { name, data: Tensor.from(stream, values, [2, 3]) },
      { name: 'scalar', data: new Uint16Array([0x3f80]), dtype: 'BF16', shape: [] },
      { name: 'six', data: new Uint8Array(3), dtype: 'F6_E2M3', shape: [2, 2] },
    ],
    { key: 'värde', '': '' },
  );
  const file = await openSafetensors(at('a.safetensors'));
  t.same([...file.tensors.keys()], ['empty', name, 'scalar', 'six']);
  t.same(file.entry('empty').shape, [0, 2 ** 52]);
  t.match(file.entry('six'), { fileDType: 'F6_E2M3', dtype: undefined, begin: 26, end: 29 });
  t.same(
    [...file.metadata],
    [
      ['key', 'värde'],
      ['', ''],
    ],
  );
  const tensor = new Tensor(stream, 'f32', [3, 2]);
  await file.read(name, tensor);
  t.same(await tensor.read(), values);
  const part = new Tensor(stream, 'f32', [2]);
  await file.readFinitePart(name, part, 3);
  t.same(await part.read(), Float32Array.of(4, 5));
  t.same(await file.readBytes('scalar'), Uint8Array.of(0x80, 0x3f));
  t.throws(() => file.read(name, part), { code: 'ERR_QLORA_SHAPE', message: /\[2, 3\].*\[2\]/ });
  t.throws(() => file.readFinitePart(name, part, 5), { code: 'ERR_QLORA_SHAPE' });
  t.throws(() => file.readFinitePart(name, part, -1), { code: 'ERR_QLORA_SHAPE' });
  t.throws(() => file.read('scalar', part), { code: 'ERR_QLORA_DTYPE', message: /BF16.*f32/ });
  t.throws(() => file.read('six', part), { code: 'ERR_QLORA_DTYPE', hint: /cannot be loaded/ });
  t.throws(() => file.readBits('scalar', part), { code: 'ERR_QLORA_SHAPE' });
  t.throws(() => file.entry('scalars'), { code: 'ERR_QLORA_TENSOR_NOT_FOUND', hint: "Did you mean 'scalar'?" });
  file.close();
  t.throws(() => file.read(name, tensor), { code: 'ERR_QLORA_DISPOSED' });
});

t.test('what cannot be written is refused before anything is', async (t) => {
  const data = new Uint8Array(4);
  const cases: [string, SafetensorsItem[], Record<string, string>?][] = [
    [
      'twice',
      [
        { name: 'a', data, dtype: 'U8' },
        { name: 'a', data, dtype: 'U8' },
      ],
    ],
    ['no dtype', [{ name: 'a', data }]],
    ['unknown dtype', [{ name: 'a', data, dtype: 'F12' as 'F16' }]],
    ['takes 12 bytes', [{ name: 'a', data, dtype: 'F32', shape: [3] }]],
    ['shape', [{ name: 'a', data, dtype: 'U8', shape: [-2, -2] }]],
    ['__metadata__', [{ name: '__metadata__', data, dtype: 'U8' }]],
    ['surrogate', [{ name: 'a\ud800', data, dtype: 'U8' }]],
    ['must be a string', [], { a: 1 as unknown as string }],
  ];
  for (const [message, items, metadata] of cases) {
    await t.rejects(writeSafetensors(at('b.safetensors'), items, metadata), {
      code: 'ERR_QLORA_ARGUMENT',
      message: new RegExp(message),
    });
  }
  const other = new Stream();
  const mixed = [stream, other].map((s, i) => ({ name: `${i}`, data: Tensor.from(s, data, [4]) }));
  await t.rejects(writeSafetensors(at('b.safetensors'), mixed), { code: 'ERR_QLORA_ARGUMENT', message: /one stream/ });
  await other.close();
  t.notOk(readdirSync(folder).includes('b.safetensors'));
});

t.test('headers that lie', async (t) => {
  const tensor = '{"dtype":"U8","shape":[4],"data_offsets":[0,4]}';
  const cases: [string, Buffer, RegExp][] = [
    [
      'overlap',
      fileOf({ a: u8(0, 4), b: u8(2, 6) }, 6),
      /'b' begins at byte 2, inside the one before it, which ends at 4/,
    ],
    ['hole', fileOf({ a: u8(0, 4), b: u8(5, 6) }, 6), /'b' begins at byte 5, leaving a hole behind 4/],
    ['hole at the start', fileOf({ a: u8(1, 4) }, 4), /hole behind 0/],
    ['beyond the end', fileOf({ a: u8(0, 5) }, 4), /beyond the end of the file, which holds 4 bytes/],
    ['data behind the last', fileOf({ a: u8(0, 4) }, 5), /end at byte 4 of the data, but the file holds 5/],
    ['no tensor but data', fileOf({}, 1), /end at byte 0/],
    ['wrong span', fileOf({ a: u8(0, 4, [5]) }, 4), /5 elements of U8 take 5 bytes, but data_offsets \[0, 4\] span 4/],
    ['backwards', fileOf({ a: u8(4, 0, [0]) }, 4), /end before they begin/],
    ['huge', fileOf({ a: u8(0, 2 ** 50) }, 4), /beyond the end/],
    ['2^60', fileOf('{"a":{"dtype":"U8","shape":[1152921504606846976],"data_offsets":[0,4]}}', 4), /above 2\^53/],
    ['product overflows', fileOf({ a: u8(0, 0, [2 ** 40, 2 ** 40]) }), /2\^64/],
    ['bits overflow', fileOf({ a: { dtype: 'F64', shape: [2 ** 32, 2 ** 28], data_offsets: [0, 0] } }), /2\^61/],
    ['half a byte', fileOf({ a: { dtype: 'F4', shape: [3], data_offsets: [0, 1] } }, 1), /no whole number of bytes/],
    ['negative', fileOf({ a: u8(0, 4, [-4]) }, 4), /non-negative integers/],
    ['fraction', fileOf('{"a":{"dtype":"U8","shape":[4.0],"data_offsets":[0,4]}}', 4), /non-negative integers/],
    ['exponent', fileOf('{"a":{"dtype":"U8","shape":[4e0],"data_offsets":[0,4]}}', 4), /non-negative integers/],
    ['leading zero', fileOf('{"a":{"dtype":"U8","shape":[04],"data_offsets":[0,4]}}', 4), /non-negative integers/],
    ['string as number', fileOf({ a: u8(0, 4, ['4']) }, 4), /non-negative integers/],
    ['three offsets', fileOf({ a: { ...u8(0, 4), data_offsets: [0, 4, 4] } }, 4), /two numbers/],
    ['one offset', fileOf({ a: { ...u8(0, 4), data_offsets: [0] } }, 4), /two numbers/],
    ['shape is no array', fileOf({ a: u8(0, 4, 4) }, 4), /shape must be an array/],
    ['unknown dtype', fileOf({ a: { ...u8(0, 4), dtype: 'F12' } }, 4), /unknown dtype 'F12'/],
    ['dtype is a number', fileOf({ a: { ...u8(0, 4), dtype: 8 } }, 4), /dtype must be a string/],
    ['missing', fileOf({ a: { dtype: 'U8', shape: [4] } }, 4), /lacks 'data_offsets'/],
    ['unknown key', fileOf({ a: { ...u8(0, 4), x: 1 } }, 4), /unknown key 'x'/],
    ['key twice', fileOf('{"a":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}', 4), /'dtype' twice/],
    ['tensor twice', fileOf(`{"a":${tensor},"b":${tensor},"a":${tensor}}`, 4), /'a' twice/],
    [
      'twice by an escape',
      fileOf(`{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"\\u0061":${tensor}}`, 4),
      /'a' twice/,
    ],
    ['metadata twice', fileOf('{"__metadata__":{},"__metadata__":{}}'), /'__metadata__' twice/],
    ['metadata key twice', fileOf('{"__metadata__":{"k":"1","k":"2"}}'), /metadata 'k' twice/],
    ['metadata of numbers', fileOf({ __metadata__: { k: 1 } }), /metadata 'k' must be a string/],
    ['metadata nested', fileOf({ __metadata__: { k: {} } }), /metadata 'k' must be a string/],
    [
      'endless metadata',
      fileOf(`{"__metadata__":{${Array.from({ length: 100_001 }, (_, i) => `"${i}":""`)}}}`),
      /more than 100000 metadata/,
    ],
    ['metadata null', fileOf({ __metadata__: null }), /expected '\{'/],
    ['tensor is a number', fileOf({ a: 1 }), /'a' must be an object/],
    ['an array', fileOf('[]'), /does not begin with/],
    ['leading space', fileOf(' {}'), /does not begin with/],
    ['empty header', fileOf(''), /does not begin with/],
    ['behind the end', fileOf('{} x'), /expected the end of the header/],
    ['trailing comma', fileOf(`{"a":${tensor},}`, 4), /expected '"'/],
    [
      'not UTF-8',
      fileOf(Buffer.concat([Buffer.from('{"'), Buffer.of(0xff), Buffer.from(`":${tensor}}`)]), 4),
      /expected UTF-8/,
    ],
    [
      'overlong',
      fileOf(Buffer.concat([Buffer.from('{"'), Buffer.of(0xc0, 0x80), Buffer.from(`":${tensor}}`)]), 4),
      /expected UTF-8/,
    ],
    [
      'surrogate in UTF-8',
      fileOf(Buffer.concat([Buffer.from('{"'), Buffer.of(0xed, 0xa0, 0x80), Buffer.from(`":${tensor}}`)]), 4),
      /expected UTF-8/,
    ],
    ['half a pair', fileOf(`{"\\ud800":${tensor}}`, 4), /surrogate pair/],
    ['wrong pair', fileOf(`{"\\ud800\\u0041":${tensor}}`, 4), /surrogate pair/],
    ['bad escape', fileOf(`{"\\x":${tensor}}`, 4), /escape sequence/],
    ['control character', fileOf(`{"\n":${tensor}}`, 4), /control character/],
    ['deep nesting', fileOf('{"a":'.repeat(100_000)), /unknown key|must be/],
    ['deep arrays', fileOf(`{"a":{"shape":${'['.repeat(100_000)}`), /non-negative integers/],
    ['length beyond the file', fileOf('{}', 0, 3n), /claims 3 bytes, but the file has only 10/],
    ['length above the limit', fileOf('{}', 0, 100_000_001n), /at most 100000000/],
    ['length of 2^64 - 1', fileOf('{}', 0, 2n ** 64n - 1n), /at most 100000000/],
    ['length too short', fileOf(`{"a":${tensor}}`, 4, 20n), /where it ends/],
    ['too short', Buffer.alloc(7), /7 bytes, too few/],
    ['empty', Buffer.alloc(0), /0 bytes, too few/],
  ];
  for (const [name, bytes, message] of cases) {
    await t.rejects(
      openBytes(bytes),
      { name: 'QLoRAError', code: 'ERR_QLORA_SAFETENSORS', message, hint: /damaged/ },
      name,
    );
  }
});

t.test('what is unusual and right', async (t) => {
  const cases: [string, Buffer, string[]][] = [
    ['no tensor', fileOf('{}'), []],
    ['white space', fileOf('{ "a" :\t{"data_offsets": [ 0 , 4 ],\n"shape":[ 2,2 ],"dtype":"U8"} } \n ', 4), ['a']],
    ['out of order', fileOf({ b: u8(2, 4), a: u8(0, 2) }, 4), ['b', 'a']],
    ['empty ones between', fileOf({ a: u8(0, 2), x: u8(2, 2), b: u8(2, 4), y: u8(4, 4) }, 4), ['a', 'x', 'b', 'y']],
    [
      'escapes',
      fileOf('{"\\ud83d\\ude00\\u00fc\\/\\n":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', 1),
      ['\u{1f600}ü/\n'],
    ],
    ['prototype', fileOf('{"__proto__":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', 1), ['__proto__']],
  ];
  for (const [name, bytes, names] of cases) t.same([...(await openBytes(bytes)).tensors.keys()], names, name);
  for (const [dtype, bits] of Object.entries(safetensorsDTypes)) {
    const file = await openBytes(fileOf({ a: { dtype, shape: [8], data_offsets: [0, bits] } }, bits));
    t.equal(file.entry('a').fileDType, dtype);
  }
});

t.test('a file cut off at every byte', async (t) => {
  const whole = fileOf({ a: u8(0, 4), b: { dtype: 'F32', shape: [2], data_offsets: [4, 12] } }, 12);
  await openBytes(whole);
  for (let n = 0; n < whole.length; n++) {
    await t.rejects(openBytes(whole.subarray(0, n)), { code: 'ERR_QLORA_SAFETENSORS' }, `cut at ${n}`);
  }
});

t.test('a file that shrinks after it was opened', async (t) => {
  const bytes = 9 << 20; // three chunks
  const data = new Uint8Array(bytes).fill(7);
  await writeSafetensors(at('shrinks.safetensors'), [{ name: 'a', data, dtype: 'U8' }]);
  const file = await openSafetensors(at('shrinks.safetensors'));
  const before = new Tensor(stream, 'u8', [bytes]);
  await file.read('a', before);
  t.ok(Buffer.from((await before.readBits()) as Uint8Array).equals(data));
  truncateSync(at('shrinks.safetensors'), 6 << 20);
  const after = new Tensor(stream, 'u8', [bytes]);
  const wanted = {
    code: 'ERR_QLORA_READ_FAILED',
    message: /tensor 'a': .*cut short after it was opened: bytes up to \d+ were wanted, it has 6291456 now/,
  };
  await t.rejects(file.read('a', after), wanted);
  await t.rejects(after.readBits(), wanted, 'whoever reads the tensor learns it too');
  await stream.sync();
});

t.test('weights that are not finite', async (t) => {
  const f32 = new Float32Array(5000);
  f32[4321] = Number.NaN;
  const data: SafetensorsItem[] = [
    { name: 'f32', data: f32, dtype: 'F32' },
    { name: 'bf16', data: Uint16Array.of(0x7f7f, 0xff80), dtype: 'BF16' },
    { name: 'f16', data: Uint16Array.of(0x7bff, 0x7c01), dtype: 'F16' },
    { name: 'fine', data: Uint16Array.of(0x7bff, 0xfbff), dtype: 'F16' },
    { name: 'bytes', data: Uint8Array.of(255, 255, 255, 255), dtype: 'U8' },
  ];
  await writeSafetensors(at('nan.safetensors'), data);
  const file = await openSafetensors(at('nan.safetensors'));
  const read = (name: string) => {
    const { dtype, shape } = file.entry(name);
    return file.readFinite(name, new Tensor(stream, dtype ?? 'u8', shape));
  };
  await t.rejects(read('f32'), {
    code: 'ERR_QLORA_NON_FINITE',
    message: /tensor 'f32': .*element 4321 is infinite or NaN/,
  });
  await t.rejects(read('bf16'), { code: 'ERR_QLORA_NON_FINITE', message: /element 1/ });
  await t.rejects(read('f16'), { code: 'ERR_QLORA_NON_FINITE', message: /element 1/ });
  await read('fine');
  await read('bytes');
});

t.test('paths that are no file', async (t) => {
  await t.rejects(openSafetensors(at('none')), { code: 'ERR_QLORA_FILE_NOT_FOUND', message: /no such file/ });
  await t.rejects(openSafetensors(folder), { code: 'ERR_QLORA_READ_FAILED', message: /no regular file/ });
  await t.rejects(openSafetensors(`${at('a.safetensors')}\0x`), {
    code: 'ERR_QLORA_READ_FAILED',
    message: /zero byte/,
  });
  execFileSync('mkfifo', [at('pipe')]);
  await t.rejects(openSafetensors(at('pipe')), { code: 'ERR_QLORA_READ_FAILED', message: /no regular file/ });
});

t.test('thousands of mutations of a header: an error or a valid header, never more', async (t) => {
  let state = 12345;
  const random = (n: number) => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor((state / 2 ** 32) * n);
  };
  const header = {
    __metadata__: { format: 'pt', 'ü\u{1f600}': '\\"\n' },
    a: u8(0, 4, [2, 2]),
    b: { dtype: 'BF16', shape: [3], data_offsets: [4, 10] },
    c: u8(10, 10),
  };
  const valid = fileOf(header, 10);
  const tokens = [
    '"',
    '{',
    '}',
    '[',
    ']',
    ',',
    ':',
    '\\u',
    '\\',
    '0',
    '-',
    '1e9',
    '99999999999999999999',
    '"a":',
    'null',
    ' ',
    '\xff',
    '\ud83d',
  ];
  let opened = 0;
  for (let round = 0; round < 2500; round++) {
    let bytes = Buffer.from(valid);
    for (let edits = 1 + random(3); edits > 0; edits--) {
      const i = random(bytes.length);
      const kind = random(4);
      const token = Buffer.from(tokens[random(tokens.length)] as string, 'latin1');
      if (kind === 0) bytes[i] = random(256);
      else if (kind === 1) bytes = Buffer.concat([bytes.subarray(0, i), bytes.subarray(i + 1 + random(8))]);
      else if (kind === 2) bytes = Buffer.concat([bytes.subarray(0, i), token, bytes.subarray(i)]);
      else bytes = Buffer.concat([bytes.subarray(0, i), bytes.subarray(random(bytes.length))]);
    }
    if (random(2) && bytes.length >= 8) bytes.writeBigUInt64LE(BigInt(Math.max(0, bytes.length - 18)));
    try {
      const file = await openBytes(bytes);
      opened++;
      const spans = [...file.tensors.values()].map(({ begin, end }) => end - begin);
      const data = bytes.length - 8 - Number(bytes.readBigUInt64LE());
      if (spans.reduce((a, b) => a + b, 0) !== data) t.fail(`round ${round}: the tensors do not cover the data`);
      file.close();
    } catch (error) {
      if (!(error instanceof QLoRAError) || error.code !== 'ERR_QLORA_SAFETENSORS') t.fail(`round ${round}: ${error}`);
    }
  }
  t.ok(opened > 20 && opened < 2000, `${opened} were valid`);
});
