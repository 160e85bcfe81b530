// Layers that share x, at once: to the bits of each by itself; and how many kernels a token takes a layer of a model.
import type { DecoderConfig } from '../../lib/models/config.js';
import { type Block, decode } from '../../lib/models/decoder.js';
import { KeyValueCache } from '../../lib/models/key-value-cache.js';
import { RopeInput } from '../../lib/models/rope-input.js';
import { Linear, type Pass } from '../../lib/nn/linear.js';
import { type FrozenLora, LoraLinear } from '../../lib/nn/lora.js';
import { add } from '../../lib/ops/elementwise.js';
import { loraLinear } from '../../lib/ops/lora-linear.js';
import { matmul } from '../../lib/ops/matmul.js';
import { type Projection, projections } from '../../lib/ops/projections.js';
import { quantizeWeight } from '../../lib/ops/quantize.js';
import { randomUniform } from '../../lib/ops/random.js';
import { Weight } from '../../lib/ops/weight.js';
import { type FloatDType, Stream, Tensor } from '../../lib/tensor.js';
import { checkMisuse, checkSameBits, forEachIsa } from '../support/op-harness.js';
import t, { type Test, testDevice } from '../support/testing.js';

const onDevice = testDevice !== 'cpu';

let seed = 0;
function random(stream: Stream, dtype: FloatDType, shape: readonly number[], size = 1): Tensor {
  const wide = new Tensor(stream, 'f32', shape);
  randomUniform(wide, -size, size, ++seed, 0);
  if (dtype === 'f32') return wide;
  const x = new Tensor(stream, dtype, shape);
  stream.run('cast', wide, x);
  return x;
}

type Kind = 'double' | 'fp4' | 'blocks of 32' | 'int8' | FloatDType;

async function weightOf(stream: Stream, kind: Kind, N: number, K: number): Promise<Weight> {
  if (kind === 'f32' || kind === 'bf16' || kind === 'f16') return Weight.dense(random(stream, kind, [N, K]));
  const type = kind === 'fp4' || kind === 'int8' ? kind : 'nf4';
  const blockSize = kind === 'blocks of 32' ? 32 : 64;
  return quantizeWeight(random(stream, 'f32', [N, K]), { type, blockSize, doubleQuant: kind === 'double' });
}

interface Group {
  dtype: FloatDType;
  M: number;
  K: number;
  /** r 0: without an adapter. */
  layers: { kind: Kind; N: number; r?: number; bias?: true; residual?: true }[];
  /** Adapters as they are trained, in f32. */
  trained?: true;
  /** On a device, where they are all done at once. */
  kernels?: number;
}

const groups: Group[] = [
  // Many rows are dealt to warps in another way than few: here some warps of a block have nothing to do; and where K is
  // 640 one of some thousand sums shows it if they were made as those of the other layer.
  { dtype: 'bf16', M: 1, K: 128, layers: [{ kind: 'double', N: 4300 }, { kind: 'double', N: 70 }, { kind: 'double', N: 9 }], kernels: 1 },
  { dtype: 'bf16', M: 1, K: 640, layers: [{ kind: 'blocks of 32', N: 24 }, { kind: 'blocks of 32', N: 130 }], kernels: 1 },
  { dtype: 'bf16', M: 4, K: 192, layers: [{ kind: 'fp4', N: 96, r: 8 }, { kind: 'double', N: 33, r: 5, bias: true }, { kind: 'double', N: 40, r: 16 }], kernels: 2 },
  { dtype: 'f16', M: 9, K: 256, layers: [{ kind: 'double', N: 80 }, { kind: 'double', N: 40, r: 8 }, { kind: 'double', N: 40, bias: true }], kernels: 2 },
  { dtype: 'bf16', M: 12, K: 2048, layers: [{ kind: 'blocks of 32', N: 7 }, { kind: 'blocks of 32', N: 9 }], kernels: 1 }, // blocks of as many warps as there are
  { dtype: 'f16', M: 20, K: 128, layers: [{ kind: 'f16', N: 100 }, { kind: 'f16', N: 36, residual: true }], kernels: 1 },
  { dtype: 'f16', M: 8, K: 640, layers: [{ kind: 'f16', N: 70 }, { kind: 'f16', N: 4300 }], kernels: 1 },
  { dtype: 'bf16', M: 40, K: 192, layers: [{ kind: 'double', N: 65, r: 8 }, { kind: 'double', N: 130, r: 8, bias: true, residual: true }], kernels: 2 },
  { dtype: 'bf16', M: 3, K: 256, layers: [{ kind: 'double', N: 48, r: 8, residual: true }], kernels: 2 },
  // Each by itself, on every device.
  { dtype: 'bf16', M: 3, K: 128, layers: [{ kind: 'double', N: 40 }, { kind: 'bf16', N: 24 }, { kind: 'blocks of 32', N: 16 }] },
  { dtype: 'bf16', M: 5, K: 128, layers: [{ kind: 'int8', N: 40, r: 8, residual: true }, { kind: 'double', N: 24, bias: true }] },
  { dtype: 'bf16', M: 70, K: 128, layers: [{ kind: 'double', N: 136, r: 8, residual: true }, { kind: 'double', N: 24 }] },
  { dtype: 'bf16', M: 6, K: 128, layers: [{ kind: 'double', N: 40, r: 8 }, { kind: 'double', N: 24, r: 8 }], trained: true },
  { dtype: 'bf16', M: 2, K: 72, layers: [{ kind: 'double', N: 40, residual: true }, { kind: 'double', N: 24 }] },
  { dtype: 'bf16', M: 5, K: 608, layers: [{ kind: 'double', N: 40, r: 8, residual: true }, { kind: 'double', N: 24, residual: true }] },
  { dtype: 'bf16', M: 5, K: 128, layers: [{ kind: 'f16', N: 40, residual: true }, { kind: 'f16', N: 24 }] },
  { dtype: 'f32', M: 5, K: 100, layers: [{ kind: 'f32', N: 30, r: 4, bias: true, residual: true }, { kind: 'fp4', N: 50 }] },
]; // biome-ignore format: a table

async function checkGroup(t: Test, { dtype, M, K, layers, trained, kernels }: Group): Promise<void> {
  const stream = new Stream(testDevice);
  const x = random(stream, dtype, [M, K]);
  const adapterDtype = trained ? 'f32' : dtype;
  const made: Projection[] = [];
  for (const { kind, N, r, bias, residual } of layers) {
    made.push({
      weight: await weightOf(stream, kind, N, K),
      bias: bias && random(stream, 'bf16', [N]),
      residual: residual && random(stream, dtype, [M, N], 8),
      lora: r
        ? { A: random(stream, adapterDtype, [r, K]), B: random(stream, adapterDtype, [N, r]), scale: 1 }
        : undefined,
    });
  }
  const before = (await stream.usage()).kernels;
  const together = projections(x, made);
  const after = (await stream.usage()).kernels;
  const what = `${dtype} ${M} x ${K} to ${layers.map(({ kind, N }) => `${N} ${kind}`)}`;
  if (onDevice && kernels) t.equal(after - before, kernels, `${what}: kernels`);
  for (const [i, { weight, bias, lora, residual }] of made.entries()) {
    const y = lora ? loraLinear(undefined, x, weight, bias, lora) : matmul(undefined, x, weight, bias);
    const alone = residual ? add(undefined, residual, y) : y;
    await checkSameBits(t, together[i] as Tensor, alone, `${what}: ${i}`);
    t.ok((await alone.read()).every(Number.isFinite), `${what}: finite`);
  }
  await stream.close();
}

/** The most scratch that so many layers of one kind take. */
async function scratchOf(kind: Kind, count: number): Promise<number> {
  const stream = new Stream(testDevice);
  const [M, N, K] = [70, 136, 128];
  const x = random(stream, 'bf16', [M, K]);
  const weights: Weight[] = [];
  while (weights.length < count) weights.push(await weightOf(stream, kind, N, K));
  projections(
    x,
    weights.map((weight) => ({ weight })),
  );
  await stream.sync();
  const { peakByClass } = stream.memory();
  await stream.close();
  return peakByClass.scratch as number;
}

const config = (numLayers: number): DecoderConfig => ({
  vocabSize: 40,
  hiddenSize: 128,
  intermediateSize: 192,
  numLayers,
  numHeads: 4,
  numKvHeads: 2,
  headDim: 32,
  norm: { eps: 1e-6, offset: 0 },
  rope: { base: 10000, rotaryDim: 32, scaling: { type: 'default' } },
  attention: { scale: 32 ** -0.5 },
  activation: 'silu',
  tiedHead: true,
});

/** A decoder's blocks with an adapter `a` on every linear layer, and one `d` with DoRA. */
async function blocksOf(stream: Stream, { numLayers, hiddenSize: C, intermediateSize: F }: DecoderConfig) {
  const frozen = new Map<Linear, FrozenLora>();
  const linear = async (N: number, K: number, bias = false) => {
    const layer = new Linear(
      `l${seed}`,
      seed,
      await weightOf(stream, 'double', N, K),
      bias ? random(stream, 'bf16', [N]) : undefined,
    );
    for (const name of ['a', 'd']) {
      const shape = { r: 8, alpha: 16, dropout: 0.5, useRslora: false, useDora: name === 'd' };
      const lora = new LoraLinear(stream, layer, shape);
      lora.initialize(layer, 'bf16', ++seed, 0);
      randomUniform(lora.B, -0.1, 0.1, seed, 1);
      layer.adapters.set(name, lora);
      if (name === 'a') frozen.set(layer, lora.frozen(layer, 'bf16'));
    }
    return layer;
  };
  const blocks: Block[] = [];
  for (let i = 0; i < numLayers; i++) {
    blocks.push({
      attentionNorm: random(stream, 'bf16', [C]), mlpNorm: random(stream, 'bf16', [C]),
      q: await linear(C, C, true), k: await linear(64, C), v: await linear(64, C), o: await linear(C, C),
      gate: await linear(F, C), up: await linear(F, C), down: await linear(C, F),
    }); // biome-ignore format: a list
  }
  return { blocks, frozen };
}

/** Passes of one token a row, with all that may be done at once and without; and the kernels of each of their layers. */
async function checkDecoder(t: Test): Promise<void> {
  const kernels: Record<string, number[]> = {};
  for (const numLayers of [1, 2]) {
    const stream = new Stream(testDevice);
    const own = config(numLayers);
    const { blocks, frozen } = await blocksOf(stream, own);
    const embedding = random(stream, 'bf16', [40, 128]);
    const weights = { embedding, layers: blocks, norm: random(stream, 'bf16', [128]), head: Weight.dense(embedding) };
    const tokens = async (name: string, pass: Pass) => {
      const cache = new KeyValueCache(stream, own, 2, 128, 'bf16');
      const rope = new RopeInput(stream, own.rope, 2);
      const before = (await stream.usage()).kernels;
      const bits: Buffer[] = [];
      const ids = [Int32Array.of(3, 5), Int32Array.of(17, 39)];
      for (const [i, row] of ids.entries()) {
        rope.write(Int32Array.of(i, i), 1);
        const input = { tokens: Tensor.from(stream, row, [2, 1]), rope, cache };
        const hidden = decode(undefined, own, weights, input, {
          ...pass,
          computeDtype: 'bf16',
          checkpointing: 'none',
        });
        cache.advance(1);
        bits.push(Buffer.from((await hidden.readBits()).buffer));
      }
      kernels[name] = [...(kernels[name] ?? []), ((await stream.usage()).kernels - before) / ids.length];
      return Buffer.concat(bits);
    };
    const passes: Record<string, Pass> = {
      base: { adapter: undefined },
      adapter: { adapter: 'a', frozen },
      dora: { adapter: 'd' },
    };
    for (const [name, pass] of Object.entries(passes)) {
      const together = await tokens(name, pass);
      const apart = await tokens(`${name} apart`, { ...pass, inspect: () => {} });
      t.ok(together.equals(apart), `${name}, ${numLayers} layers: the same bits`);
    }
    await stream.close();
  }
  if (!onDevice) return;
  const ofLayer = (name: string) => {
    const [one, two] = kernels[name] as [number, number];
    return two - one;
  };
  // Norm, q k v, rope and cache, attention and its parts added up, o; norm, gate and up, their product, down.
  t.equal(ofLayer('base'), 10);
  t.equal(ofLayer('adapter'), 14, 'four times as many x A^T as products');
  t.equal(ofLayer('base apart'), 15, 'but for the cache, which is always written at once');
}

await forEachIsa(t, import.meta.url, async () => {
  for (const group of groups) {
    await t.test(`${group.layers.length} layers, ${group.M} rows, ${group.layers[0]?.kind}`, (t) =>
      checkGroup(t, group),
    );
  }
  await t.test('layers that are done one after the other share their scratch', async (t) => {
    for (const kind of ['double', 'f16', 'int8'] as const)
      t.equal(await scratchOf(kind, 3), await scratchOf(kind, 1), kind);
  });
  await t.test('a token', checkDecoder);
  const layer = (s: Stream): Projection => ({ weight: Weight.dense(new Tensor(s, 'f32', [4, 5])) });
  const x = (s: Stream) => new Tensor(s, 'f32', [2, 5]);
  await checkMisuse(t, [
    {
      name: 'no layer',
      run: (s) => projections(x(s), []),
      code: 'ERR_QLORA_ARGUMENT',
      message: /from one to three layers/,
    },
    {
      name: 'four layers',
      run: (s) => projections(x(s), [layer(s), layer(s), layer(s), layer(s)]),
      code: 'ERR_QLORA_ARGUMENT',
      message: /takes \d+ arguments/,
    },
    {
      name: 'a layer of another width',
      run: (s) => projections(x(s), [layer(s), { weight: Weight.dense(new Tensor(s, 'f32', [4, 3])) }]),
      code: 'ERR_QLORA_SHAPE',
      message: /x must have shape \[\.\., 3\], got \[2, 5\]/,
    },
    {
      name: 'a residual of another shape',
      run: (s) => projections(x(s), [{ ...layer(s), residual: new Tensor(s, 'f32', [4, 2]) }]),
      code: 'ERR_QLORA_SHAPE',
      message: /residual/,
    },
    {
      name: 'half an adapter',
      run: (s) =>
        s.run(
          'projections',
          x(s),
          1,
          ...layer(s).weight.args,
          null,
          new Tensor(s, 'f32', [3, 5]),
          null,
          null,
          x(s),
          null,
          1,
        ),
      code: 'ERR_QLORA_SHAPE',
      message: /loraB must have shape \[4, 3\], got \[\]/,
    },
    {
      name: 'what an adapter has, without one',
      run: (s) => s.run('projections', x(s), 1, ...layer(s).weight.args, null, null, null, null, x(s), x(s), 1),
      code: 'ERR_QLORA_ARGUMENT',
      message: /loraA, loraB and t come together or not at all/,
    },
  ]);
});
