import { join } from 'node:path';
import t, { type Test } from 'tap';
import { zeros } from '../lib/ops/elementwise.js';
import { gradNorm } from '../lib/ops/grad-norm.js';
import { adamw, sgd } from '../lib/ops/optimizer.js';
import { Stream, Tensor } from '../lib/tensor.js';
import { checkMisuse, forEachIsa } from './support/op-harness.js';
import { readJson, referencesDir } from './support/references.js';
import { readSafetensors, type StoredTensor, valuesOf } from './support/safetensors.js';

interface Trace {
  name: string;
  optimizer: string;
  options: { lr: number; betas?: number[]; eps?: number; weight_decay: number; momentum?: number; bits?: number };
  size: number;
  /** Those after which `param` has a row. */
  steps: number[];
  start: string;
  grad: string;
  param: string;
  finalState: Record<string, string>;
}

interface Clipping {
  name: string;
  maxNorm: number;
  tensors: number;
  totalNorm: number;
}

const folder = referencesDir('optimizers');
const index = readJson<{ traces: Trace[]; clipping: Clipping[] }>(folder, 'index.json');
/** The fp32 tensors of a file, by name. */
function tensorsOf(file: string): (name: string) => { shape: number[]; data: Float32Array } {
  const tensors = readSafetensors(join(folder, file));
  return (name) => {
    const tensor = tensors.get(name) as StoredTensor;
    return { shape: tensor.shape, data: valuesOf(tensor) };
  };
}

const reference = tensorsOf('traces.safetensors');
const clipping = tensorsOf('clipping.safetensors');
const steps = 12;

/** The largest |a - e| over 1e-6 + 1e-6 |e|: at most 1 is what the references allow. */
function worst(actual: Float32Array, expected: Float32Array): number {
  if (actual.length !== expected.length) return Number.POSITIVE_INFINITY;
  let most = 0;
  for (const [i, e] of expected.entries()) {
    const error = Math.abs((actual[i] as number) - e) / (1e-6 + 1e-6 * Math.abs(e));
    most = Math.max(most, Number.isNaN(error) ? Number.POSITIVE_INFINITY : error);
  }
  return most;
}

/** Cut in two tensors, of which the first has an odd size. */
function split(stream: Stream, data: Float32Array): Tensor[] {
  const cut = Math.floor(data.length / 3) | 1;
  const parts = data.length > 1 ? [data.slice(0, cut), data.slice(cut)] : [data];
  return parts.map((part) => Tensor.from(stream, part, [part.length]));
}

async function readAll(tensors: readonly Tensor[]): Promise<Float32Array> {
  const parts = await Promise.all(tensors.map((x) => x.read()));
  return Float32Array.from(parts.flatMap((part) => [...part]));
}

async function checkTrace(t: Test, { optimizer, options, size, ...trace }: Trace): Promise<void> {
  const stream = new Stream();
  const params = split(stream, reference(trace.start).data.slice(0, size));
  const [m, v] = [0, 1].map(() => params.map((p) => zeros(stream, p.shape, 'f32', 'optimizer'))) as [
    Tensor[],
    Tensor[],
  ];
  const { data, shape } = reference(trace.grad);
  const columns = shape[1] as number;
  const expected = reference(trace.param).data;
  const { lr, weight_decay: weightDecay, betas: [beta1, beta2] = [], eps, momentum } = options;
  for (let step = 1; step <= steps; step++) {
    const row = (step - 1) * columns;
    const gradients = split(stream, data.slice(row, row + size));
    const norm = gradNorm(stream, gradients);
    const common = { lr, weightDecay, step, maxNorm: 0 };
    if (optimizer === 'adamw') {
      const own = { beta1: beta1 as number, beta2: beta2 as number, eps: eps as number };
      adamw(params, gradients, { m, v }, norm, { ...common, ...own });
    } else {
      sgd(params, gradients, momentum ? m : [], norm, { ...common, momentum: momentum as number });
    }
    const at = trace.steps.indexOf(step);
    if (at >= 0) {
      const error = worst(await readAll(params), expected.slice(at * size, (at + 1) * size));
      t.ok(error <= 1, `step ${step}: ${error.toFixed(3)} of what is allowed`);
    }
    for (const tensor of [...gradients, norm]) tensor.dispose();
  }
  for (const [name, state] of [
    ['m', m],
    ['v', v],
  ] as const) {
    const expectedState = trace.finalState[name];
    if (expectedState) t.ok(worst(await readAll(state), reference(expectedState).data) <= 1, name);
  }
  await stream.close();
}

await forEachIsa(t, import.meta.url, async () => {
  const traces = index.traces.filter(
    ({ optimizer, options, size }) =>
      (optimizer === 'adamw' || optimizer === 'sgd') && (options.bits !== 8 || size < 4096),
  );
  t.ok(traces.length >= 20, 'the references have traces of both');
  for (const trace of traces) await t.test(trace.name, (t) => checkTrace(t, trace));

  for (const { name, maxNorm, tensors, totalNorm } of index.clipping) {
    await t.test(`clipping: ${name}`, async (t) => {
      const stream = new Stream();
      const originals = Array.from({ length: tensors }, (_, i) => clipping(`${name}.grad.${i}`));
      const gradients = originals.map(({ data, shape }) => Tensor.from(stream, data, shape));
      const norm = gradNorm(stream, gradients);
      const [actual, finite] = await norm.read();
      t.ok(Math.abs((actual as number) - totalNorm) <= 2e-6 * totalNorm, `norm ${actual}, expected ${totalNorm}`);
      t.equal(finite, 1);
      // From zero and with a rate of -1, SGD's parameters become the gradients that it used.
      const params = originals.map(({ shape }) => zeros(stream, shape, 'f32'));
      sgd(params, gradients, [], norm, { lr: -1, momentum: 0, weightDecay: 0, step: 1, maxNorm });
      for (const [i, original] of originals.entries()) {
        const used = await (params[i] as Tensor).read();
        const expected = clipping(`${name}.clipped.${i}`).data;
        const bad = expected.findIndex((e, j) => Math.abs((used[j] as number) - e) > 2e-6 * Math.abs(e));
        t.equal(bad, -1, 'clipped as PyTorch does');
        if (totalNorm < maxNorm) t.same([...used], [...original.data], 'bit for bit');
        t.same([...(await (gradients[i] as Tensor).read())], [...original.data], 'gradients are left as they are');
      }
      await stream.close();
    });
  }

  await t.test('a gradient that is not finite changes nothing', async (t) => {
    for (const spoilt of [Number.NaN, Number.POSITIVE_INFINITY]) {
      const stream = new Stream();
      const lists = [1, 2, 3, 4].map((x) => [Tensor.from(stream, Float32Array.of(x, x), [2])]);
      const [params, m, v, momentum] = lists as [Tensor[], Tensor[], Tensor[], Tensor[]];
      const gradients = [Tensor.from(stream, Float32Array.of(1, spoilt), [2])];
      const norm = gradNorm(stream, gradients);
      t.equal((await norm.read())[1], 0);
      const common = { lr: 0.1, weightDecay: 0.1, step: 2, maxNorm: 1 };
      adamw(params, gradients, { m, v }, norm, { ...common, beta1: 0.9, beta2: 0.999, eps: 1e-8 });
      sgd(params, gradients, momentum, norm, { ...common, momentum: 0.9 });
      for (const [i, list] of lists.entries()) t.same([...(await (list[0] as Tensor).read())], [i + 1, i + 1]);
      await stream.close();
    }
  });

  await t.test('the norm of gradients whose squares overflow fp32, and of none', async (t) => {
    const stream = new Stream();
    const huge = gradNorm(stream, [Tensor.from(stream, new Float32Array(40000).fill(1e30), [200, 200])]);
    t.ok(Math.abs(((await huge.read())[0] as number) / 2e32 - 1) < 1e-6);
    t.same([...(await gradNorm(stream, []).read())], [0, 1]);
    await stream.close();
  });

  const step = { lr: 0.1, weightDecay: 0, step: 1, maxNorm: 0 };
  const list = (s: Stream, ...shape: number[]) => [zeros(s, shape, 'f32')];
  await checkMisuse(t, [
    {
      name: 'gradients of another shape',
      run: (s) => sgd(list(s, 2), list(s, 3), [], zeros(s, [2], 'f32'), { ...step, momentum: 0 }),
      code: 'ERR_QLORA_SHAPE',
      message: /sgd: grads must have shape \[2\], got \[3\]/,
    },
    {
      name: 'momentum without a place for it',
      run: (s) => sgd(list(s, 2), list(s, 2), [], zeros(s, [2], 'f32'), { ...step, momentum: 0.9 }),
      code: 'ERR_QLORA_ARGUMENT',
      message: /sgd: m must list 1 tensors, as params does, got 0/,
    },
    {
      name: 'a step before the first',
      run: (s) => sgd(list(s, 2), list(s, 2), [], zeros(s, [2], 'f32'), { ...step, step: 0, momentum: 0 }),
      code: 'ERR_QLORA_ARGUMENT',
      message: /sgd: step counts from 1/,
    },
    {
      name: '16-bit parameters',
      run: (s) => {
        const options = { ...step, beta1: 0.9, beta2: 0.999, eps: 1e-8 };
        const state = { m: list(s, 2), v: list(s, 2) };
        adamw([zeros(s, [2], 'bf16')], list(s, 2), state, zeros(s, [2], 'f32'), options);
      },
      code: 'ERR_QLORA_DTYPE',
      message: /adamw: params must be f32, got bf16/,
    },
  ]);
});
