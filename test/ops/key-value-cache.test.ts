/** Keys and values of the tokens so far, written and moved in place. */
import { appendKeyValue, gatherKeyValue } from '../../lib/ops/key-value-cache.js';
import { Stream, Tensor } from '../../lib/tensor.js';
import { checkMisuse, forEachIsa } from '../support/op-harness.js';
import t, { testDevice } from '../support/testing.js';

await forEachIsa(t, import.meta.url, async () => {
  await t.test('appendKeyValue writes its rows and nothing else', async (t) => {
    const stream = new Stream(testDevice);
    const cache = Tensor.from(stream, new Float32Array(2 * 5 * 2 * 3).fill(-1), [2, 5, 2, 3]);
    const rows = Float32Array.from({ length: 2 * 2 * 2 * 3 }, (_, i) => i);
    appendKeyValue(Tensor.from(stream, rows, [2, 2, 2, 3]), cache, Tensor.from(stream, Int32Array.of(2, 1), [2]));
    const expected = Array.from({ length: 60 }, (_, n) => {
      const b = Math.floor(n / 30);
      const t = (Math.floor(n / 6) % 5) - (b === 0 ? 2 : 1);
      return t === 0 || t === 1 ? (b * 2 + t) * 6 + (n % 6) : -1;
    });
    t.same([...(await cache.read())], expected);
    await stream.close();
  });

  await t.test('gatherKeyValue moves rows, also its own', async (t) => {
    const [B, S, G, D] = [3, 40, 1, 5];
    for (const sources of [B, 1]) {
      const stream = new Stream(testDevice);
      const values = (rows: number) => Float32Array.from({ length: rows * S * G * D }, (_, i) => i);
      const cache = Tensor.from(stream, values(B), [B, S, G, D]);
      const source = sources === B ? cache : Tensor.from(stream, values(sources), [sources, S, G, D]);
      const from = sources === B ? [1, 2, 1] : [0, -1, 0];
      gatherKeyValue(source, Tensor.from(stream, Int32Array.from(from), [B]), cache, 3, 38);
      const expected = Array.from({ length: B * S * G * D }, (_, i) => {
        const [row, position] = [Math.floor(i / (S * D)), Math.floor(i / D) % S];
        const stays = position < 3 || position >= 38 || from[row] === -1;
        return stays ? i : (from[row] as number) * S * D + (i % (S * D));
      });
      t.same([...(await cache.read())], expected, `from ${sources}`);
      await stream.close();
    }
  });

  const zeros = (s: Stream, shape: readonly number[]) => new Tensor(s, 'f32', shape);
  await checkMisuse(t, [
    {
      name: 'a full cache',
      run: (s) => {
        const x = Tensor.from(s, new Float32Array(16), [1, 4, 1, 4]);
        const rows = Tensor.from(s, new Float32Array(8), [1, 2, 1, 4]);
        appendKeyValue(rows, x, Tensor.from(s, Int32Array.of(3), [1]));
        return x.read();
      },
      code: 'ERR_QLORA_SHAPE',
      message: /2 rows at 3 do not fit into a cache of 4/,
    },
    {
      name: 'a row that the source does not have',
      run: (s) => {
        const cache = Tensor.from(s, new Float32Array(8), [2, 4, 1, 1]);
        gatherKeyValue(cache, Tensor.from(s, Int32Array.of(0, 2), [2]), cache, 0, 4);
        return s.sync().then(() => cache.read());
      },
      code: 'ERR_QLORA_ARGUMENT',
      message: /from\[1\] must be from -1 to 1, got 2/,
    },
    {
      name: 'more tokens than the source has',
      run: (s) => gatherKeyValue(zeros(s, [1, 2, 1, 4]), new Tensor(s, 'i32', [1]), zeros(s, [1, 4, 1, 4]), 0, 3),
      code: 'ERR_QLORA_SHAPE',
      message: /tokens 0 to 3 are not within caches of 2 and 4/,
    },
  ]);
});
