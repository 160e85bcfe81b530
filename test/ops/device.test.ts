/** What every device owes the engine: bytes that arrive, memory that is counted, errors that travel, files, paging. */
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Tape } from '../../lib/autograd.js';
import { memory } from '../../lib/devices.js';
import { PageFile } from '../../lib/io/page-file.js';
import { openSafetensors, writeSafetensors } from '../../lib/io/safetensors.js';
import { add, scale, zeros } from '../../lib/ops/elementwise.js';
import { gradNorm } from '../../lib/ops/grad-norm.js';
import { optimizerStep } from '../../lib/ops/optimizer.js';
import { rmsNorm } from '../../lib/ops/rms-norm.js';
import { Stream, Tensor } from '../../lib/tensor.js';
import { checkSameBits, normalNumbers } from '../support/op-harness.js';
import { counters } from '../support/optimizer-traces.js';
import t, { testDevice } from '../support/testing.js';

/** Not a multiple of any piece that copies are cut into, and longer than several. */
const long = 9_000_001;
const normals = (n: number, seed = 1) => Float32Array.from({ length: n }, normalNumbers(seed));
const liveBytes = () => memory().find(({ device }) => device === testDevice)?.liveBytes;

// First, since it counts the whole process: what other tests left to the garbage collector would go meanwhile.
await t.test('memory is counted and used again', async (t) => {
  const before = liveBytes() ?? 0;
  const stream = new Stream(testDevice);
  const weights = zeros(stream, [1000, 1000], 'bf16', 'weights');
  const step = async () => {
    using x = zeros(stream, [1000, 1000], 'f32');
    using y = scale(undefined, x, 2);
    await y.read();
  };
  await step();
  const first = stream.memory();
  for (let i = 0; i < 20; i++) await step();
  await stream.sync();
  const after = stream.memory();
  t.equal(first.byClass.weights, 2_000_000);
  t.equal(after.peakBytes, first.peakBytes, 'a step that repeats takes what the first did');
  t.equal(after.liveBytes, 2_000_000);
  t.equal((liveBytes() ?? 0) - before, 2_000_000, 'of the whole process');
  weights.dispose();
  await stream.sync();
  t.equal(stream.memory().liveBytes, 0);
  await stream.close();
});

await t.test('bytes go to the device and come back', async (t) => {
  const stream = new Stream(testDevice);
  const bytes = Uint8Array.from({ length: long }, (_, i) => (i * 2654435761) >>> 13);
  const x = new Tensor(stream, 'u8', [long]);
  const written = x.write(bytes);
  const read = x.readBits();
  await written;
  t.ok(Buffer.from((await read) as Uint8Array).equals(Buffer.from(bytes)), 'long ones');
  const small = [0, 1, 3, 1000].map((n) =>
    Tensor.from(
      stream,
      Int32Array.from({ length: n }, (_, i) => i - 5),
      [n],
    ),
  );
  for (const s of small)
    t.same(
      [...(await s.readBits())],
      Array.from({ length: s.size }, (_, i) => i - 5),
    );
  // What was written goes on to be used while the next is written over it.
  const y = Tensor.from(stream, Float32Array.of(1, 2, 3), [3]);
  const sums = [];
  for (let i = 0; i < 50; i++) {
    y.write(Float32Array.of(i, 2 * i, 3 * i)).catch(() => {});
    sums.push(add(undefined, y, y).read());
  }
  const all = await Promise.all(sums);
  t.ok(all.every((sum, i) => sum[0] === 2 * i && sum[2] === 6 * i));
  await stream.close();
});

await t.test('a rehearsal takes what a run takes', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'qlora-device-'));
  t.teardown(() => rmSync(folder, { recursive: true }));
  const peaks = [];
  for (const purpose of [undefined, 'rehearsal'] as const) {
    const stream = new Stream(testDevice, purpose);
    const tape = new Tape();
    const x = zeros(stream, [70, 300], 'bf16');
    x.requiresGrad = true;
    const weight = zeros(stream, [300], 'f32', 'weights');
    weight.requiresGrad = true;
    weight.gradient = zeros(stream, [300], 'f32', 'optimizer');
    const y = rmsNorm(tape, x, weight, 1e-6);
    const dy = zeros(stream, [70, 300], 'bf16');
    tape.backward(y, dy, x)?.dispose();
    gradNorm(stream, [weight.gradient]);
    using _slots = await PageFile.create(stream, folder, 1_000_000, 300_000);
    await stream.sync();
    peaks.push(stream.memory().peakByClass);
    await stream.close();
  }
  t.same(peaks[1], peaks[0]);
});

await t.test('out of memory, and on', async (t) => {
  const stream = new Stream(testDevice);
  stream.setMemoryLimit(1_000_000);
  const x = zeros(stream, [100_000], 'f32');
  const y = scale(undefined, zeros(stream, [500_000], 'f32'), 2);
  await t.rejects(y.read(), { code: 'ERR_QLORA_OUT_OF_MEMORY', message: /2000000 bytes of activations were wanted/ });
  t.equal((await x.read()).length, 100_000, 'what fits goes on');
  const never = new Tensor(stream, 'f32', [3]);
  await t.rejects(scale(undefined, never, 2).read(), { code: 'ERR_QLORA_INTERNAL', message: /nothing has written/ });
  await stream.close();
  await t.rejects(x.read(), { code: 'ERR_QLORA_DISPOSED' });
});

const onCpu = testDevice === 'cpu' && 'the CPU has no memory beside its own';

await t.test('what moves to the host comes back as it was', { skip: onCpu }, async (t) => {
  const stream = new Stream(testDevice);
  const values = normals(200_000);
  const written = Tensor.from(stream, values, [values.length]);
  const x = scale(undefined, written, 2);
  written.dispose();
  const doubled = values.map((v) => 2 * v);
  const ofHost = () => memory()[0]?.byClass.activations as number;
  const before = ofHost();
  for (let round = 0; round < 3; round++) {
    x.startMove('host');
    using same = scale(undefined, x, 1);
    x.finishMove();
    t.same(await same.read(), doubled, 'it may be read while it leaves');
    t.same([stream.memory().liveBytes, stream.memory().pinnedBytes], [4 * x.size, 4 * x.size]);
    t.equal(ofHost() - before, 4 * x.size, 'which the host counts');
    using failed = scale(undefined, x, 1);
    const notThere = { code: 'ERR_QLORA_INTERNAL', message: /not on the device/ };
    await t.rejects(failed.read(), notThere);
    await t.rejects(x.read(), notThere);
    // What else gets its memory meanwhile leaves it alone.
    using other = zeros(stream, [x.size], 'f32');
    x.startMove('device');
    using tooEarly = scale(undefined, x, 1);
    await t.rejects(tooEarly.read(), notThere);
    x.finishMove();
    using back = scale(undefined, x, 1);
    t.same(await back.read(), doubled);
    t.ok((await other.read()).every((v) => v === 0));
    t.equal(stream.memory().pinnedBytes, 0);
  }
  await stream.close();
});

// Copies that take far longer than the start of a kernel, and memory that others had before and want after.
await t.test('kernels that begin early wait for copies beside them', { skip: onCpu }, async (t) => {
  const stream = new Stream(testDevice);
  const numbers = Float32Array.from({ length: 4 << 20 }, (_, i) => (i % 8191) - 4000);
  const written = Tensor.from(stream, numbers, [numbers.length]);
  for (const factor of [2, 3, 4]) {
    const x = scale(undefined, written, factor);
    x.startMove('host');
    x.finishMove();
    // It gets the memory that the copy has read.
    const next = scale(undefined, written, -1);
    const before = new Tensor(stream, 'f32', [x.size]);
    stream.run('fill', before, Number.NaN);
    before.dispose();
    x.startMove('device');
    x.finishMove();
    const back = scale(undefined, x, 1);
    await checkSameBits(t, back, scale(undefined, written, factor), 'what came back');
    await checkSameBits(t, scale(undefined, next, -1), written, 'what was given its memory');
    for (const tensor of [x, next, back]) tensor.dispose();
  }
  await stream.close();
});

await t.test('moves that nobody ends', { skip: onCpu }, async (t) => {
  const stream = new Stream(testDevice);
  const make = () => {
    using zero = zeros(stream, [200_000], 'f32');
    return scale(undefined, zero, 1);
  };
  for (const to of ['host', 'device'] as const) {
    const x = make();
    x.startMove('host');
    if (to === 'device') {
      x.finishMove();
      x.startMove('device');
    }
    x.dispose();
    // Whichever of them gets its memory keeps its own numbers, also when copies that came later have ended.
    const next = [1, 2, 3].map((value) => {
      const tensor = new Tensor(stream, 'f32', [x.size]);
      stream.run('fill', tensor, value);
      return tensor;
    });
    const later = make();
    later.startMove('host');
    later.finishMove();
    for (const [i, tensor] of next.entries()) {
      t.ok(
        (await tensor.read()).every((v) => v === i + 1),
        `on the way to the ${to}`,
      );
    }
    for (const tensor of [...next, later]) tensor.dispose();
  }
  const left = make();
  left.startMove('host');
  left.startMove('host');
  await t.rejects(left.read(), { code: 'ERR_QLORA_INTERNAL', message: /on its way already/ });
  left.dispose();
  const x = make();
  t.throws(() => stream.record(() => x.startMove('host')), { code: 'ERR_QLORA_INTERNAL', message: /no moves/ });
  x.startMove('host');
  x.finishMove();
  await stream.sync();
  stream.setMemoryLimit(1000);
  x.startMove('device');
  x.finishMove();
  await t.rejects(x.read(), { code: 'ERR_QLORA_OUT_OF_MEMORY' }, 'no memory to come back to');
  x.dispose();
  await stream.sync();
  t.same([stream.memory().liveBytes, stream.memory().pinnedBytes], [0, 0]);
  x.dispose();
  await stream.close();
});

await t.test('the same bits each time', async (t) => {
  const stream = new Stream(testDevice);
  const x = Tensor.from(stream, normals(300 * 1001), [300, 1001]);
  const dy = Tensor.from(stream, normals(300 * 1001, 2), [300, 1001]);
  const runs: Buffer[] = [];
  for (let i = 0; i < 3; i++) {
    const weight = Tensor.from(stream, normals(1001, 3), [1001]);
    weight.requiresGrad = true;
    x.requiresGrad = true;
    weight.gradient = zeros(stream, [1001], 'f32');
    const tape = new Tape();
    const dx = tape.backward(rmsNorm(tape, x, weight, 1e-6), dy, x) as Tensor;
    const norm = gradNorm(stream, [dx, weight.gradient]);
    runs.push(
      Buffer.concat(
        [await dx.read(), await weight.gradient.read(), await norm.read()].map((a) => Buffer.from(a.buffer)),
      ),
    );
  }
  t.ok(runs.every((run) => run.equals(runs[0] as Buffer)));
  await stream.close();
});

await t.test('files', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'qlora-device-'));
  t.teardown(() => rmSync(folder, { recursive: true }));
  const stream = new Stream(testDevice);
  const path = join(folder, 'a.safetensors');
  const values = normals(long >> 1);
  const x = Tensor.from(stream, values, [values.length]);
  await writeSafetensors(path, [{ name: 'x', data: x }]);
  const load = async () => {
    using file = await openSafetensors(path);
    const y = new Tensor(stream, 'f32', [values.length], 'weights');
    await file.readFinite('x', y);
    return y;
  };
  const same = (a: Float32Array) => Buffer.from(a.buffer).equals(Buffer.from(values.buffer));
  t.ok(same(await (await load()).read()), 'as it was');
  values[values.length - 2] = Number.NaN;
  x.write(values).catch(() => {});
  await writeSafetensors(path, [{ name: 'x', data: x }]);
  await t.rejects(
    load().then((y) => y.read()),
    {
      code: 'ERR_QLORA_NON_FINITE',
      message: new RegExp(`element ${values.length - 2} is infinite or NaN`),
    },
  );
  truncateSync(path, 1000);
  await t.rejects(load(), { code: /^ERR_QLORA_/ });
  writeFileSync(path, '');
  await t.rejects(load(), { code: 'ERR_QLORA_SAFETENSORS' });
  await stream.close();
});

await t.test('paged state gives the bits of state in memory', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'qlora-device-'));
  t.teardown(() => rmSync(folder, { recursive: true }));
  const sizes = [100_001, 256, 70_000];
  for (const bits of [32, 8] as const) {
    const results = [];
    for (const paged of [false, true]) {
      const stream = new Stream(testDevice);
      using file = await PageFile.create(stream, folder, 3_000_000, 300_000);
      const state = (dtype: 'f32' | 'u8', n: number) =>
        paged ? file.tensor(dtype, [n]) : zeros(stream, [n], dtype, 'optimizer');
      const lists =
        bits === 32
          ? [0, 1].map(() => sizes.map((n) => state('f32', n)))
          : [0, 1].flatMap(() => [
              sizes.map((n) => state('u8', n)),
              sizes.map((n) => state('f32', Math.ceil(n / 256))),
            ]);
      const params = sizes.map((n, i) => Tensor.from(stream, normals(n, i + 1), [n]));
      const counted = counters(stream, 1);
      for (let step = 0; step < 3; step++) {
        const gradients = sizes.map((n, i) => Tensor.from(stream, normals(n, 10 * step + i), [n]));
        const norm = gradNorm(stream, gradients);
        optimizerStep(bits === 8 ? 'adamw8bit' : 'adamw', { params, gradients, norm, ...counted }, lists, {
          lr: 0.01,
          weightDecay: 0.1,
          maxNorm: 1,
          beta1: 0.9,
          beta2: 0.999,
          eps: 1e-8,
        });
      }
      const parts = await Promise.all(params.map(async (p) => Buffer.from((await p.read()).buffer)));
      parts.push(...(await Promise.all(lists.flat().map(async (s) => Buffer.from((await s.readBits()).buffer)))));
      results.push(Buffer.concat(parts));
      await stream.close();
    }
    t.ok((results[0] as Buffer).equals(results[1] as Buffer), `${bits} bits`);
  }
});

await t.test(
  'what it can do is measured',
  { skip: testDevice === 'cpu' ? 'bench.test.ts looks at the CPU' : false },
  async (t) => {
    const stream = new Stream(testDevice);
    for (const compute of [0, 1, 2]) {
      const rates = new Tensor(stream, 'f32', [2]);
      stream.run('roofline', rates, compute);
      const [flops, bytes] = await rates.read();
      t.ok(Number.isFinite(flops) && (flops as number) > 0, `${flops} GFLOP/s`);
      t.ok(Number.isFinite(bytes) && (bytes as number) > 0, `${bytes} GB/s`);
    }
    await stream.close();
  },
);
