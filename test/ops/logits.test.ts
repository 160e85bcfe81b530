import { join } from 'node:path';
import { argmax, beamCandidates, sample } from '../../lib/ops/logits-choose.js';
import {
  type ConstrainOptions,
  constrainLogits,
  logSoftmax,
  type WarpOptions,
  warpLogits,
} from '../../lib/ops/logits-process.js';
import { Stream, Tensor } from '../../lib/tensor.js';
import { checkMisuse, forEachIsa, largestError, normalNumbers } from '../support/op-harness.js';
import { philox } from '../support/philox.js';
import { readJson, referencesDir } from '../support/references.js';
import { readSafetensors, type StoredTensor, valuesOf } from '../support/safetensors.js';
import t, { testDevice } from '../support/testing.js';

interface Processed {
  options: WarpOptions & Omit<ConstrainOptions, 'seen' | 'forbidden'> & { forbidden?: number[] };
  tensor: string;
}

const key = { seed: 2 ** 45 + 3, stream: 11 };
/** Rows that a distribution is counted over. A device may be an emulated one, where each costs a millisecond. */
const rowsDrawn = testDevice === 'cpu' ? 20000 : 2500;
const beamsDrawn = testDevice === 'cpu' ? 4000 : 800;

/**
 * What transformers' warpers leave, as probabilities: scores / temperature; scores below the k-th largest go; of the
 * rest, sorted upwards, those go whose cumulative probability is at most 1 - topP, but never the last.
 */
function probabilities(logits: readonly number[], { temperature = 1, topK = 0, topP = 1 }: WarpOptions) {
  let scores = logits.map((z) => z / temperature);
  const softmax = () => {
    const most = Math.max(...scores);
    const weights = scores.map((z) => Math.exp(z - most));
    const sum = weights.reduce((a, b) => a + b);
    return weights.map((w) => w / sum);
  };
  if (topK > 0) {
    const least = [...scores].sort((a, b) => b - a)[Math.min(topK, scores.length) - 1] as number;
    scores = scores.map((z) => (z < least ? Number.NEGATIVE_INFINITY : z));
  }
  if (topP < 1) {
    const p = softmax();
    const upwards = p.map((_, i) => i).sort((a, b) => (p[a] as number) - (p[b] as number) || b - a);
    let sum = 0;
    const upTo = (i: number) => {
      sum += p[i] as number;
      return sum;
    };
    const removed = new Set(upwards.filter((i) => upTo(i) <= 1 - topP && i !== upwards.at(-1)));
    scores = scores.map((z, i) => (removed.has(i) ? Number.NEGATIVE_INFINITY : z));
  }
  return softmax();
}

/** How often each token came in `draws` draws from the same logits. */
async function frequencies(logits: readonly number[], options: WarpOptions, draws: number): Promise<number[]> {
  const stream = new Stream(testDevice);
  const rows = new Float32Array(draws * logits.length);
  for (let row = 0; row < draws; row++) rows.set(logits, row * logits.length);
  const warped = warpLogits(Tensor.from(stream, rows, [draws, logits.length]), options);
  const ids = await sample(warped, key).read();
  await stream.close();
  const counts = logits.map(() => 0);
  for (const id of ids) counts[id] = (counts[id] as number) + 1;
  return counts.map((count) => count / draws);
}

async function likeliest(logits: Float32Array): Promise<number> {
  const stream = new Stream(testDevice);
  const ids = argmax(Tensor.from(stream, logits, [1, logits.length])).read();
  return (await ids.finally(() => stream.close()))[0] as number;
}

const normal = normalNumbers(7);
const wide = Array.from({ length: 37 }, () => 2 * normal());
const bans = [1, Number.NEGATIVE_INFINITY, 0.5, Number.NEGATIVE_INFINITY, 2];
const ties = [1, 3, 3, 3, 0, 3];

const cases: [string, readonly number[], WarpOptions][] = [
  ['all', wide, {}],
  ['temperature', wide, { temperature: 0.5 }],
  ['hot', wide, { temperature: 3 }],
  ['top-k', wide, { topK: 5 }],
  ['top-k 1', wide, { topK: 1 }],
  ['top-k beyond the vocabulary', wide, { topK: 100 }],
  ['top-k that cuts equals keeps them', ties, { topK: 2 }],
  ['top-p', wide, { topP: 0.9 }],
  ['top-p of next to nothing keeps one', wide, { topP: 1e-6 }],
  ['all three', wide, { temperature: 1.5, topK: 12, topP: 0.7 }],
  ['forbidden tokens', bans, {}],
  ['forbidden tokens, top-k 4', bans, { topK: 4 }],
  ['one token', [0.3], { topP: 0.5, topK: 3 }],
];

await forEachIsa(t, import.meta.url, async () => {
  for (const [name, logits, options] of cases) {
    await t.test(name, async (t) => {
      const draws = rowsDrawn;
      const expected = probabilities(logits, options);
      const actual = await frequencies(logits, options, draws);
      // 4.5 standard deviations, and 3 draws of what is next to never drawn.
      const wrong = expected.flatMap((p, id) => {
        const f = actual[id] as number;
        const allowed = p === 0 ? 0 : 4.5 * Math.sqrt((p * (1 - p)) / draws) + 3 / draws;
        return Math.abs(f - p) <= allowed ? [] : [{ id, f, p }];
      });
      t.same(wrong, []);
    });
  }

  await t.test('what is left of logits, and with which probability, by transformers', async (t) => {
    const folder = referencesDir('generation');
    const { processed } = readJson<{ processed: Processed[] }>(folder, 'index.json');
    t.ok(processed.length > 20);
    const stored = readSafetensors(join(folder, 'processed.safetensors'));
    const tensor = (name: string) => stored.get(name) as StoredTensor;
    const { shape, data } = tensor('logits');
    const stream = new Stream(testDevice);
    const logits = Tensor.from(stream, data as Float32Array, shape);
    const seen = Tensor.from(stream, tensor('seen').data as Int32Array, tensor('seen').shape);
    for (const { options, tensor: name } of processed) {
      const { forbidden, ...rest } = options;
      const constraints = {
        ...rest,
        seen,
        seenLength: seen.dim(1),
        forbidden: forbidden && Tensor.from(stream, Int32Array.from(forbidden), [forbidden.length]),
      };
      const left = await warpLogits(constrainLogits(logits, constraints), rest).read();
      const V = shape[1] as number;
      const actual = [0, 1, 2].flatMap((row) => probabilities([...left.subarray(row * V, (row + 1) * V)], {}));
      const expected = valuesOf(tensor(name));
      const kept = (p: ArrayLike<number>) => Array.from(p, (x) => x > 0);
      t.same(kept(actual), kept(expected), `${JSON.stringify(options)}: the same tokens`);
      t.ok(largestError(actual, expected, 1) < 2e-6, 'the same probabilities');
    }
    await stream.close();
  });

  await t.test('what rows of different length have seen', async (t) => {
    const stream = new Stream(testDevice);
    const logits = Float32Array.from({ length: 10 }, (_, i) => (i % 2 ? 1 : -1) * (i + 1));
    const both = [-1, -1, 1, 4, 3, 2, 3, 4];
    const constrain = (rows: Float32Array, seen: number[], B: number) => {
      const ids = Tensor.from(stream, Int32Array.from(seen), [B, seen.length / B]);
      const options = { seen: ids, seenLength: seen.length / B, repetitionPenalty: 1.5, noRepeatNgramSize: 2 };
      return constrainLogits(Tensor.from(stream, rows, [B, 5]), options).read();
    };
    const apart = [
      ...(await constrain(logits.subarray(0, 5), both.slice(2, 4), 1)),
      ...(await constrain(logits.subarray(5), both.slice(4), 1)),
    ];
    t.same([...(await constrain(logits, both, 2))], apart, 'as each row alone');
    await stream.close();
  });

  await t.test('greedy', async (t) => {
    t.equal(await likeliest(Float32Array.of(1, 5, 2, 5)), 1, 'the lowest id among equals');
    t.equal(await likeliest(Float32Array.of(-3, -2, Number.NEGATIVE_INFINITY)), 1);
    t.equal(await likeliest(new Float32Array(600).fill(1, 255, 257).fill(1, 599)), 255);
    const large = Float32Array.from({ length: 50257 }, normal);
    t.equal(await likeliest(large), large.indexOf(Math.max(...large)));
  });

  await t.test('the draw is a function of seed, stream and row', async (t) => {
    // Of equal logits the u-th part of them is drawn.
    const V = 1000;
    const stream = new Stream(testDevice);
    const ids = await sample(Tensor.from(stream, new Float32Array(5 * V), [5, V]), key).read();
    const expected = [0, 1, 2, 3, 4].map((row) => Math.floor((philox(key.seed, key.stream, row)[0] / 2 ** 32) * V));
    t.same([...ids], expected);
    await stream.close();
  });

  for (const spread of [1 / 16, 2, 8]) {
    await t.test(`what is left of a large vocabulary, spread ${spread}`, async (t) => {
      const V = 20011;
      const stream = new Stream(testDevice);
      // In steps, so that many are equal; some forbidden, blocks of them at both ends.
      const logits = Float32Array.from({ length: V }, (_, i) =>
        i < 600 || i > 19500 || i % 7 === 0 ? Number.NEGATIVE_INFINITY : Math.round(32 * spread * normal()) / 32,
      );
      const leftOf = async (options: WarpOptions) => {
        const out = await warpLogits(Tensor.from(stream, logits, [1, V]), options).read();
        return Array.from(out.keys()).filter((i) => out[i] !== Number.NEGATIVE_INFINITY);
      };
      const order = Array.from(logits.keys())
        .filter((i) => logits[i] !== Number.NEGATIVE_INFINITY)
        .sort((a, b) => (logits[b] as number) - (logits[a] as number) || a - b);
      const upwards = (ids: readonly number[]) => [...ids].sort((a, b) => a - b);
      for (const topK of [1, 2, 70, 78, 79, 300, 5000, V - 1]) {
        const least = logits[order[Math.min(topK, order.length) - 1] as number] as number;
        const wanted = order.filter((i) => (logits[i] as number) >= least);
        t.same(await leftOf({ topK }), upwards(wanted), `top-k ${topK}: ${wanted.length}`);
      }
      const p = probabilities([...logits], {});
      const mass = (ids: readonly number[]) => ids.reduce((sum, i) => sum + (p[i] as number), 0);
      const entropy = order.reduce((sum, i) => sum - (p[i] as number) * Math.log(p[i] as number), 0);
      const distance = (i: number) => Math.abs(-Math.log(p[i] as number) - entropy);
      for (const [part, keep] of [0.01, 0.2, 0.9, 0.99].flatMap(
        (x) =>
          [
            [x, 1],
            [x, 700],
          ] as [number, number][],
      )) {
        const kept = await leftOf({ topP: part, keep });
        t.same(kept, upwards(order.slice(0, kept.length)), `top-p ${part}, ${keep}: ${kept.length}`);
        t.ok(kept.length >= keep && mass(kept) > part - 1e-5);
        t.ok(kept.length === keep || mass(order.slice(0, kept.length - 1)) < part + 1e-5);

        const typical = new Set(await leftOf({ typicalP: part, keep }));
        const farthest = Math.max(...[...typical].map(distance));
        const nearest = Math.min(...order.filter((i) => !typical.has(i)).map(distance));
        t.ok(nearest > farthest - 1e-5, `typical ${part}, ${keep}: ${typical.size}`);
        t.ok(typical.size >= keep && mass([...typical]) > part - 1e-5);
        const nearer = [...typical].filter((i) => distance(i) < farthest - 1e-5);
        t.ok(typical.size === keep || mass(nearer) < part + 1e-5, 'and no more');
      }
      await stream.close();
    });
  }

  await t.test('draws where whole blocks are forbidden', async (t) => {
    const [left, draws] = [[255, 256, 700, 2999], 2000];
    const logits = new Array(3001).fill(Number.NEGATIVE_INFINITY);
    for (const [i, id] of left.entries()) logits[id] = Math.log((i + 1) / 10);
    const actual = await frequencies(logits, {}, draws);
    t.ok(actual.every((f, id) => left.includes(id) || f === 0));
    for (const [i, id] of left.entries()) {
      const p = (i + 1) / 10;
      t.ok(Math.abs((actual[id] as number) - p) < 4.5 * Math.sqrt((p * (1 - p)) / draws), `${id}`);
    }
  });

  await t.test('NaN anywhere', async (t) => {
    for (let i = 0; i < 83; i++) {
      const logits = Float32Array.from({ length: 83 }, normal).fill(Number.NaN, i, i + 1);
      await t.rejects(likeliest(logits), { code: 'ERR_QLORA_NON_FINITE' }, `at ${i}`);
    }
  });

  await t.test('the best continuations of beams', async (t) => {
    const stream = new Stream(testDevice);
    const [B, V, count] = [3, 1009, 12];
    const logits = Float32Array.from({ length: B * V }, normal);
    logits[5] = Number.NEGATIVE_INFINITY;
    const logProbs = logSoftmax(Tensor.from(stream, logits, [B, V]));
    const p = await logProbs.read();
    for (let b = 0; b < B; b++) {
      const row = logits.subarray(b * V, (b + 1) * V);
      const logSum = Math.log(row.reduce((sum, z) => sum + Math.exp(z), 0));
      t.ok(row.every((z, i) => z === p[b * V + i] || Math.abs(z - logSum - (p[b * V + i] as number)) < 2e-6));
    }
    const running = Float32Array.of(-0.5, Number.NEGATIVE_INFINITY, 0.25);
    const all = Array.from(p, (x, i) => ({ i, score: Math.fround(x + (running[Math.floor(i / V)] as number)) }));
    all.sort((a, b) => b.score - a.score || a.i - b.i);
    const runningScores = Tensor.from(stream, running, [B]);
    const best = beamCandidates(logProbs, runningScores, { ...key, count, noise: 0 });
    t.same(
      [...(await best.places.read())],
      all.slice(0, count).map(({ i }) => i),
    );
    t.same(
      [...(await best.scores.read())],
      all.slice(0, count).map(({ score }) => score),
    );
    const few = Tensor.from(stream, Float32Array.of(1, Number.NEGATIVE_INFINITY, 1, 2), [1, 4]);
    const left = beamCandidates(few, Tensor.from(stream, Float32Array.of(10), [1]), { ...key, count: 5, noise: 0 });
    t.same([...(await left.places.read())].slice(0, 3), [3, 0, 2], 'the earlier of equals first');
    t.same([...(await left.scores.read())], [12, 11, 11, Number.NEGATIVE_INFINITY, Number.NEGATIVE_INFINITY]);
    await stream.close();
  });

  await t.test('continuations drawn without replacement', async (t) => {
    const stream = new Stream(testDevice);
    const many = Float32Array.from({ length: 1009 }, normal);
    const noisy = Array.from(many, (score, i) => {
      const [high, low] = philox(key.seed, key.stream, i);
      const u = (high * 2 ** 21 + (low >>> 11) + 0.5) / 2 ** 53;
      return { i, key: score - Math.log(-Math.log(u)) };
    }).sort((a, b) => b.key - a.key);
    const all = Tensor.from(stream, many, [1, many.length]);
    const largest = beamCandidates(all, Tensor.from(stream, new Float32Array(1), [1]), { ...key, count: 9, noise: 1 });
    t.same(
      [...(await largest.places.read())],
      Array.from(noisy.slice(0, 9), ({ i }) => i),
      'the largest keys',
    );
    const logits = Float32Array.of(0, 1, 2, 0.5, 1.5, -1);
    const logProbs = Tensor.from(stream, logits, [2, 3]);
    const running = Tensor.from(stream, Float32Array.of(0.3, -0.2), [2]);
    const weights = Array.from(logits, (z, i) => Math.exp(z + (i < 3 ? 0.3 : -0.2)));
    const total = weights.reduce((a, b) => a + b);
    const draws = beamsDrawn;
    const first = weights.map(() => 0);
    const pair = new Map<number, number>();
    const results = await Promise.all(
      Array.from({ length: draws }, (_, i) =>
        beamCandidates(logProbs, running, { seed: 7, stream: i, count: 2, noise: 1 }).places.read(),
      ),
    );
    for (const [a = 0, b = 0] of results) {
      first[a] = (first[a] as number) + 1;
      pair.set(a * 6 + b, (pair.get(a * 6 + b) ?? 0) + 1);
    }
    const near = (count: number, p: number) => Math.abs(count / draws - p) < 4.5 * Math.sqrt((p * (1 - p)) / draws);
    weights.forEach((w, a) => {
      t.ok(near(first[a] as number, w / total), `first ${a}`);
      weights.forEach((v, b) => {
        const p = a === b ? 0 : (w / total) * (v / (total - w));
        t.ok(a === b ? !pair.has(a * 7) : near(pair.get(a * 6 + b) ?? 0, p), `${a}, then ${b}`);
      });
    });
    await stream.close();
  });

  await checkMisuse(t, [
    ...[Number.NaN, Number.POSITIVE_INFINITY].map((bad) => ({
      name: `a logit ${bad}`,
      run: (s: Stream) => sample(Tensor.from(s, Float32Array.of(0, 1, 2, bad), [2, 2]), key).read(),
      code: 'ERR_QLORA_NON_FINITE',
      message: /logits of row 1 are not finite/,
    })),
    {
      name: 'nothing but forbidden tokens',
      run: (s) => sample(Tensor.from(s, new Float32Array(3).fill(Number.NEGATIVE_INFINITY), [1, 3]), key).read(),
      code: 'ERR_QLORA_NO_TOKEN_LEFT',
      message: /every token of row 0 is forbidden/,
    },
    {
      name: 'a logit NaN that is not looked at',
      run: (s) => warpLogits(Tensor.from(s, Float32Array.of(0, 1, 2, Number.NaN), [2, 2]), { topK: 1 }).read(),
      code: 'ERR_QLORA_NON_FINITE',
      message: /logits of row 1 are not finite/,
    },
    {
      name: 'bans that leave nothing',
      run: (s) => {
        const seen = Tensor.from(s, Int32Array.of(2, 0, 1), [1, 3]);
        return constrainLogits(Tensor.from(s, new Float32Array(3), [1, 3]), {
          seen,
          seenLength: 3,
          noRepeatNgramSize: 1,
        }).read();
      },
      code: 'ERR_QLORA_NO_TOKEN_LEFT',
      message: /every token of row 0 is forbidden/,
    },
    {
      name: 'a forbidden id that the vocabulary lacks',
      run: (s) => {
        const forbidden = Tensor.from(s, Int32Array.of(1, 3), [2]);
        return constrainLogits(Tensor.from(s, new Float32Array(3), [1, 3]), { forbidden }).read();
      },
      code: 'ERR_QLORA_TOKEN_ID',
      message: /forbidden\[1\] must be from 0 to 2, got 3/,
    },
    ...(
      [
        [{ topP: 0 }, /topP must be above 0 and at most 1/],
        [{ typicalP: 0 }, /typicalP must be above 0 and at most 1/],
        [{ temperature: 0 }, /temperature must be above 0/],
        [{ keep: 0 }, /keep must be at least 1/],
      ] as const
    ).map(([options, message]) => ({
      name: JSON.stringify(options),
      run: (s: Stream) => warpLogits(new Tensor(s, 'f32', [1, 3]), options),
      code: 'ERR_QLORA_ARGUMENT',
      message,
    })),
    {
      name: 'a repetition penalty of 0',
      run: (s) => constrainLogits(new Tensor(s, 'f32', [1, 3]), { repetitionPenalty: 0 }),
      code: 'ERR_QLORA_ARGUMENT',
      message: /repetitionPenalty must be above 0/,
    },
    {
      name: 'more ids seen than there are',
      run: (s) => constrainLogits(new Tensor(s, 'f32', [1, 3]), { seen: new Tensor(s, 'i32', [1, 2]), seenLength: 3 }),
      code: 'ERR_QLORA_ARGUMENT',
      message: /seenLength must be from 0 to the number of columns/,
    },
    {
      name: 'running scores of another number of beams',
      run: (s) =>
        beamCandidates(new Tensor(s, 'f32', [2, 3]), new Tensor(s, 'f32', [3]), { ...key, count: 1, noise: 0 }),
      code: 'ERR_QLORA_SHAPE',
      message: /running must have shape \[2\], got \[3\]/,
    },
    {
      name: '16-bit logits',
      run: (s) => sample(new Tensor(s, 'bf16', [1, 3]), key),
      code: 'ERR_QLORA_DTYPE',
      message: /logits must be f32, got bf16/,
    },
  ]);
});
