import t from 'tap';
import { type SampleOptions, sample } from '../../lib/ops/sample.js';
import { Stream, Tensor } from '../../lib/tensor.js';
import { checkMisuse, forEachIsa, normalNumbers } from '../support/op-harness.js';
import { philox } from '../support/philox.js';

const key = { seed: 2 ** 45 + 3, stream: 11 };

/**
 * What transformers' warpers leave, as probabilities: scores / temperature; scores below the k-th largest go; of the
 * rest, sorted upwards, those go whose cumulative probability is at most 1 - topP, but never the last.
 */
function probabilities(logits: readonly number[], { temperature = 1, topK = 0, topP = 1 }: Partial<SampleOptions>) {
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
async function frequencies(
  logits: readonly number[],
  options: Partial<SampleOptions>,
  draws: number,
): Promise<number[]> {
  const stream = new Stream();
  const rows = new Float32Array(draws * logits.length);
  for (let row = 0; row < draws; row++) rows.set(logits, row * logits.length);
  const ids = await sample(Tensor.from(stream, rows, [draws, logits.length]), { ...key, ...options }).read();
  await stream.close();
  const counts = logits.map(() => 0);
  for (const id of ids) counts[id] = (counts[id] as number) + 1;
  return counts.map((count) => count / draws);
}

async function drawOnce(logits: Float32Array, options: Partial<SampleOptions>): Promise<number> {
  const stream = new Stream();
  const [id] = await sample(Tensor.from(stream, logits, [1, logits.length]), { ...key, ...options }).read();
  await stream.close();
  return id as number;
}

const normal = normalNumbers(7);
const wide = Array.from({ length: 37 }, () => 2 * normal());
const bans = [1, Number.NEGATIVE_INFINITY, 0.5, Number.NEGATIVE_INFINITY, 2];
const ties = [1, 3, 3, 3, 0, 3];

const cases: [string, readonly number[], Partial<SampleOptions>][] = [
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
      const draws = 20000;
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

  await t.test('greedy', async (t) => {
    t.equal(await drawOnce(Float32Array.of(1, 5, 2, 5), { temperature: 0 }), 1, 'the lowest id among equals');
    t.equal(await drawOnce(Float32Array.of(-3, -2, Number.NEGATIVE_INFINITY), { temperature: 0, topP: 0.1 }), 1);
    const large = Float32Array.from({ length: 50257 }, normal);
    t.equal(await drawOnce(large, { temperature: 0 }), large.indexOf(Math.max(...large)));
  });

  await t.test('the draw is a function of seed, stream and row', async (t) => {
    // Of equal logits the u-th part of them is drawn.
    const V = 1000;
    const stream = new Stream();
    const ids = await sample(Tensor.from(stream, new Float32Array(5 * V), [5, V]), key).read();
    const expected = [0, 1, 2, 3, 4].map((row) => Math.floor((philox(key.seed, key.stream, row)[0] / 2 ** 32) * V));
    t.same([...ids], expected);
    await stream.close();
  });

  await t.test('a large vocabulary, flat and steep, is cut where it should be', async (t) => {
    const [V, draws] = [20011, 50];
    for (const spread of [0.01, 1, 8]) {
      const logits = Float32Array.from({ length: V }, () => spread * normal());
      const options = { topP: 0.8 };
      const p = probabilities([...logits], options);
      const kept = p.filter((x) => x > 0).length;
      const stream = new Stream();
      const rows = new Float32Array(draws * V);
      for (let row = 0; row < draws; row++) rows.set(logits, row * V);
      const ids = await sample(Tensor.from(stream, rows, [draws, V]), { ...key, ...options }).read();
      t.ok(
        ids.every((id) => (p[id] as number) > 0),
        `${kept} of ${V} kept`,
      );
      t.ok(new Set(ids).size > Math.min(kept, draws) / 4, 'and they differ');
      await stream.close();
    }
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
      code: 'ERR_QLORA_NON_FINITE',
      message: /logits of row 0 are not finite/,
    },
    {
      name: 'top-p 0',
      run: (s) => sample(new Tensor(s, 'f32', [1, 3]), { ...key, topP: 0 }),
      code: 'ERR_QLORA_ARGUMENT',
      message: /topP must be above 0 and at most 1/,
    },
    {
      name: '16-bit logits',
      run: (s) => sample(new Tensor(s, 'bf16', [1, 3]), key),
      code: 'ERR_QLORA_DTYPE',
      message: /logits must be f32, got bf16/,
    },
  ]);
});
