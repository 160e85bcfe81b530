/** Operations that are enqueued once and run often. */

import { Tape } from '../../lib/autograd.js';
import { rmsNorm } from '../../lib/ops/rms-norm.js';
import { Stream, Tensor } from '../../lib/tensor.js';
import t, { testDevice } from '../support/testing.js';

t.test('recorded operations run when they are told to, as often as they are', async (t) => {
  const stream = new Stream(testDevice);
  const [x, sum] = [Tensor.from(stream, Float32Array.of(1, 2), [2]), Tensor.from(stream, new Float32Array(2), [2])];
  let twice: Tensor | undefined;
  const recording = stream.record(() => {
    using between = new Tensor(stream, 'f32', [2]);
    twice = new Tensor(stream, 'f32', [2]);
    stream.run('add', x, x, between);
    stream.run('add', between, sum, twice);
  });
  await t.rejects((twice as Tensor).read(), { code: 'ERR_QLORA_INTERNAL' }, 'nothing has run');
  recording.run();
  t.same([...(await (twice as Tensor).read())], [2, 4]);
  // On a device the second run makes a graph, and the others launch it.
  for (const value of [10, 7, -3, 0.5]) {
    x.write(Float32Array.of(value, 2 * value));
    recording.run();
    t.same([...(await (twice as Tensor).read())], [2 * value, 4 * value], 'of what is there now');
  }
  sum.write(Float32Array.of(100, 100));
  recording.run();
  recording.run();
  t.same([...(await (twice as Tensor).read())], [101, 102], 'whatever was disposed of');

  const broken = new Tensor(stream, 'f32', [1 << 20]);
  stream.setMemoryLimit(1);
  stream.run('fill', broken, 0);
  const after = new Tensor(stream, 'f32', [1 << 20]);
  const failing = stream.record(() => stream.run('add', broken, broken, after));
  failing.run();
  await t.rejects(after.read(), { code: 'ERR_QLORA_OUT_OF_MEMORY' }, 'errors travel through it');
  stream.setMemoryLimit(0);
  for (const value of [1, 2, 3, 4]) {
    stream.run('fill', broken, value);
    failing.run();
    t.equal((await after.read())[1], 2 * value, 'and are gone with their cause');
  }

  const refused = (enqueue: () => void, message: RegExp) =>
    t.throws(() => stream.record(enqueue), { code: 'ERR_QLORA_INTERNAL', message });
  refused(() => void x.readBits(), /no reads and writes/);
  refused(() => void x.write(Float32Array.of(0, 0)), /no reads and writes/);
  refused(() => void stream.record(() => {}), /within another/);
  stream.run('add', x, x, sum);
  t.same([...(await sum.read())], [1, 2], 'after a recording that failed operations run again');

  recording[Symbol.dispose]();
  t.throws(() => recording.run(), { code: 'ERR_QLORA_DISPOSED' });
  for (const tensor of [x, sum, twice, broken, after]) tensor?.dispose();
  failing[Symbol.dispose]();
  await stream.sync();
  t.equal(stream.memory().liveBytes, 0, 'what it held went with it');
  const left = stream.record(() => {});
  await stream.close();
  t.throws(() => left.run(), { code: 'ERR_QLORA_DISPOSED' });
  left[Symbol.dispose]();
});

t.test('errors come and go, whether or not there is a graph', async (t) => {
  const stream = new Stream(testDevice);
  const [x, sum] = [new Tensor(stream, 'f32', [1 << 16]), new Tensor(stream, 'f32', [1 << 16])];
  const recording = stream.record(() => stream.run('add', x, x, sum));
  recording.run();
  await t.rejects(sum.read(), { code: 'ERR_QLORA_INTERNAL', message: /nothing has written/ });
  for (const value of [1, 2, 3]) {
    stream.run('fill', x, value);
    recording.run();
    t.equal((await sum.read())[9], 2 * value, 'gone with their cause');
  }
  // An input that fails when the graph is there already, in an operation of its own.
  using never = new Tensor(stream, 'f32', [1 << 16]);
  stream.run('add', never, never, x);
  recording.run();
  await t.rejects(sum.read(), { code: 'ERR_QLORA_INTERNAL' }, 'passed on');
  for (const value of [4, 5]) {
    stream.run('fill', x, value);
    recording.run();
    t.equal((await sum.read())[9], 2 * value, 'and gone again');
  }
  t.throws(() => stream.record(() => recording.run()), { code: 'ERR_QLORA_INTERNAL', message: /within another/ });
  // A closed stream has let go of what its recordings held.
  for (const tensor of [x, sum, never]) tensor.dispose();
  await stream.sync();
  t.ok(stream.memory().liveBytes > 0);
  await stream.close();
  t.equal(stream.memory().liveBytes, 0, 'though the recording is still there');
  recording[Symbol.dispose]();
});

t.test('what a recording works in is its own', async (t) => {
  const stream = new Stream(testDevice);
  const [rows, D] = [128, 64];
  const ones = (n: number) => Tensor.from(stream, new Float32Array(n * D).fill(1), [n, D]);
  const [x, dy, weight] = [ones(rows), ones(rows), Tensor.from(stream, new Float32Array(D).fill(1), [D])];
  const gradient = Tensor.from(stream, new Float32Array(D), [D]);
  weight.requiresGrad = true;
  weight.gradient = gradient;
  // On a device the sums of 64 groups of rows are scratch.
  const recording = stream.record(() => {
    const tape = new Tape();
    using y = rmsNorm(tape, x, weight, 0, 0);
    tape.backward(y, dy);
  });
  const others: Tensor[] = [];
  for (let i = 0; i < 5; i++) {
    recording.run();
    // Takes whatever memory is free now.
    others.push(...Array.from({ length: 20 }, () => ones(64)));
  }
  t.same([...(await gradient.read())], Array(D).fill(5 * rows));
  for (const other of others) t.ok((await other.read()).every((value) => value === 1));
  recording[Symbol.dispose]();
  await stream.close();
});

// A graph of one stream's operations is none of the other's business, which waits, takes and frees meanwhile.
t.test('a recording is run while another stream comes and goes', async (t) => {
  const comeAndGo = async () => {
    for (let i = 0; i < 10; i++) {
      const stream = new Stream(testDevice);
      const y = new Tensor(stream, 'f32', [100_000]);
      stream.run('fill', y, i);
      if (testDevice !== 'cpu') {
        y.startMove('host');
        y.finishMove();
        y.startMove('device');
        y.finishMove();
      }
      t.ok((await y.read()).every((value) => value === i));
      y.dispose();
      await stream.close();
    }
  };
  const record = async () => {
    const stream = new Stream(testDevice);
    const x = Tensor.from(stream, Float32Array.of(1, 2), [2]);
    for (let i = 0; i < 20; i++) {
      using sum = new Tensor(stream, 'f32', [2]);
      using recording = stream.record(() => {
        for (let k = 0; k < 50; k++) stream.run('add', x, x, sum);
      });
      for (let run = 0; run < 3; run++) recording.run();
      t.same([...(await sum.read())], [2, 4]);
    }
    await stream.close();
  };
  await Promise.all([comeAndGo(), record()]);
});
