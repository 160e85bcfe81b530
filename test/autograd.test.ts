/** The tape: what it keeps, what it frees and when, and that checkpoints compute the same. */
import t from 'tap';
import { checkpoint, Tape } from '../lib/autograd.js';
import { add, dropout, scale } from '../lib/ops/elementwise.js';
import { loraLinear } from '../lib/ops/lora-linear.js';
import { matmul } from '../lib/ops/matmul.js';
import { rmsNorm } from '../lib/ops/rms-norm.js';
import { Weight } from '../lib/ops/weight.js';
import { Stream, Tensor } from '../lib/tensor.js';

const floats = (n: number, seed = 1) => Float32Array.from({ length: n }, (_, i) => Math.sin(seed + 7 * i));
const ones = (like: Tensor) => Tensor.from(like.stream, new Float32Array(like.size).fill(1), like.shape);
const live = async (stream: Stream) => {
  await stream.sync();
  return stream.memory().byClass.activations as number;
};

t.test('frozen inputs record nothing and get no gradient', async (t) => {
  const stream = new Stream();
  const [x, w] = [Tensor.from(stream, floats(6), [2, 3]), Tensor.from(stream, floats(12), [4, 3])];
  const tape = new Tape();
  const y = scale(tape, matmul(tape, x, Weight.dense(w)), 2);
  t.notOk(y.requiresGrad, 'nothing depends on a parameter');
  let ran = 0;
  tape.record([x], [y], [], () => {
    ran++;
    return [];
  });
  t.equal(tape.backward(y, ones(y), x), undefined);
  t.equal(ran, 0, 'its rule does not run');
  // The gradient goes through the trained branch alone.
  const a = Tensor.from(stream, floats(6, 2), [2, 3]);
  a.requiresGrad = true;
  const sum = add(tape, scale(tape, x, 3), scale(tape, a, 5));
  t.ok(sum.requiresGrad);
  const da = tape.backward(sum, ones(sum), a) as Tensor;
  t.same([...(await da.read())], Array(6).fill(5));
  const again = add(tape, scale(tape, x, 3), scale(tape, a, 5));
  t.equal(tape.backward(again, ones(again), x), undefined, 'no gradient of a frozen input');
  await stream.close();
});

t.test('a tensor used twice gets both gradients', async (t) => {
  const stream = new Stream();
  const x = Tensor.from(stream, floats(4), [4]);
  x.requiresGrad = true;
  const tape = new Tape();
  // y = 2 x + (x + x) = 4 x, and y + x = 5 x
  const y = add(tape, scale(tape, x, 2), add(tape, x, x));
  const z = add(tape, y, x);
  const dz = Tensor.from(stream, Float32Array.of(1, -2, 0, 0.5), [4]);
  const dx = tape.backward(z, dz, x) as Tensor;
  t.same([...(await dx.read())], [5, -10, 0, 2.5]);
  t.same([...(await dz.read())], [1, -2, 0, 0.5], 'the gradient that was given is not touched');
  await stream.close();
});

t.test('a root on which nothing depends, several outputs, and a missing gradient', async (t) => {
  const stream = new Stream();
  const x = Tensor.from(stream, floats(2), [2]);
  x.requiresGrad = true;
  const tape = new Tape();
  const [a, b] = [scale(undefined, x, 1), scale(undefined, x, 1)];
  const seen: unknown[] = [];
  tape.record([x], [a, b], [], (gradients) => {
    seen.push(gradients.map((g) => g !== undefined));
    return [gradients[1]];
  });
  const c = scale(tape, b, 3);
  const dx = tape.backward(c, ones(c), x) as Tensor;
  t.same([...(await dx.read())], [3, 3]);
  t.same(seen, [[false, true]]);
  await stream.close();
});

t.test('what an entry saved is freed right after it', async (t) => {
  const stream = new Stream();
  const [n, depth] = [1000, 10];
  const x = Tensor.from(stream, floats(n), [1, n]);
  x.requiresGrad = true;
  const tape = new Tape();
  const before = await live(stream);
  const taken: Tensor[] = [];
  let h = x;
  for (let i = 0; i < depth; i++) {
    const y = scale(undefined, h, 2);
    const kept = scale(undefined, h, 0);
    tape.record([h], [y], [kept], ([dy]) => {
      // As much as the entry frees: were that to wait for the end, twice as much would live there.
      taken.push(scale(undefined, h, 1));
      using doubled = scale(undefined, dy as Tensor, 2);
      return [add(undefined, doubled, kept)];
    });
    kept.dispose();
    if (h !== x) h.dispose();
    h = y;
  }
  t.equal((await live(stream)) - before, (depth + 1) * 4 * n, 'the saved tensors and the last output live');
  const dy = ones(h);
  const dx = tape.backward(h, dy, x) as Tensor;
  t.equal((await dx.read())[0], 2 ** depth);
  const peak = stream.memory().peakBytes - before;
  t.ok(peak <= (depth + 7) * 4 * n, `at most ${peak} bytes lived`);
  for (const tensor of [h, dy, dx, ...taken]) tensor.dispose();
  t.equal(await live(stream), before);
  await stream.close();
});

t.test('a whole pass leaves nothing, and clear() drops a tape', async (t) => {
  const stream = new Stream();
  const w = Weight.dense(Tensor.from(stream, floats(64), [8, 8], 'weights'));
  const x = Tensor.from(stream, floats(16), [2, 8]);
  x.requiresGrad = true;
  const norm = Tensor.from(stream, floats(8, 3), [8], 'weights');
  const forward = (tape: Tape) => {
    using a = matmul(tape, x, w);
    using b = rmsNorm(tape, a, norm, 1e-5);
    return add(tape, b, a);
  };
  const before = await live(stream);
  const tape = new Tape();
  for (let i = 0; i < 3; i++) {
    using y = forward(tape);
    using dy = ones(y);
    using dx = tape.backward(y, dy, x) as Tensor;
    t.ok((await dx.read()).every(Number.isFinite));
  }
  t.equal(await live(stream), before, 'after backward');
  const dropped = forward(tape);
  dropped.dispose();
  t.ok((await live(stream)) > before, 'the tape holds what its rules read');
  tape.clear();
  t.equal(await live(stream), before, 'after clear()');
  using y = forward(tape);
  tape.record([y], [y], [x], () => {
    throw new Error('a rule that fails');
  });
  using dy = ones(y);
  t.throws(() => tape.backward(y, dy), { message: 'a rule that fails' });
  y.dispose();
  dy.dispose();
  t.equal(await live(stream), before, 'after a rule that failed');
  await stream.close();
});

t.test('a checkpoint computes the same bits, dropout too, and keeps less', async (t) => {
  const stream = new Stream();
  const parameter = (shape: number[], seed: number) => {
    const tensor = Tensor.from(
      stream,
      floats(
        shape.reduce((a, b) => a * b),
        seed,
      ),
      shape,
      'adapters',
    );
    tensor.requiresGrad = true;
    tensor.gradient = Tensor.from(stream, new Float32Array(tensor.size), shape, 'optimizer');
    return tensor;
  };
  const w = Weight.dense(Tensor.from(stream, floats(1024, 4), [32, 32], 'weights'));
  const x = Tensor.from(stream, floats(320), [10, 32]);
  const [A, B] = [parameter([4, 32], 5), parameter([32, 4], 6)];
  const mask = Tensor.from(stream, floats(320, 9), [10, 32]);
  let runs = 0;
  const block = (tape: Tape | undefined, h: Tensor) => {
    runs++;
    using a = loraLinear(tape, h, w, undefined, { A, B, scale: 0.5, dropout: 0.3, seed: 1, stream: 7 });
    using b = dropout(tape, a, { p: 0.2, seed: 3, stream: 8 });
    using c = add(tape, b, mask);
    return add(tape, c, h);
  };
  const pass = async (kind: 'plain' | 'checkpoint', trainInput: boolean) => {
    x.requiresGrad = trainInput;
    for (const p of [A, B]) p.gradient?.write(new Float32Array(p.size)).catch(() => {});
    const tape = new Tape();
    const before = await live(stream);
    const once = (h: Tensor) => (kind === 'plain' ? block(tape, h) : checkpoint(tape, h, block, [mask]));
    using y = once(x);
    using z = once(y);
    const kept = (await live(stream)) - before;
    using dz = ones(z);
    using dx = tape.backward(z, dz, x);
    const values = await Promise.all([z, dx, A.gradient, B.gradient].map((tensor) => tensor?.read()));
    return { values, kept };
  };
  for (const trainInput of [true, false]) {
    const plain = await pass('plain', trainInput);
    runs = 0;
    const checked = await pass('checkpoint', trainInput);
    t.equal(runs, 4, 'each block runs twice');
    t.same(checked.values, plain.values, `input trained: ${trainInput}`);
    t.ok(
      (plain.values[2] as Float32Array).some((v) => v !== 0),
      'parameters inside get gradients though x needs none',
    );
    t.equal(checked.kept, 2 * 4 * 320, 'only the outputs are kept');
    t.ok(plain.kept > checked.kept);
  }
  const before = await live(stream);
  const tape = new Tape();
  let first = true;
  const failing = (inner: Tape | undefined, h: Tensor) => {
    const y = scale(inner, h, 2);
    if (first) {
      first = false;
      return y;
    }
    y.dispose();
    throw new Error('the second time');
  };
  x.requiresGrad = true;
  const y = checkpoint(tape, x, failing);
  const dy = ones(y);
  t.throws(() => tape.backward(y, dy), { message: 'the second time' });
  y.dispose();
  dy.dispose();
  t.equal(await live(stream), before, 'one that fails leaves nothing');
  t.equal(checkpoint(undefined, x, (tape) => scale(tape, x, 1)).requiresGrad, false, 'without a tape it only runs');
  await stream.close();
});
