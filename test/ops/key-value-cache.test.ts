/** Keys and values of the tokens so far, written and moved in place. */
import { gatherKeyValue } from '../../lib/ops/key-value-cache.js';
import { rope, ropeAppend } from '../../lib/ops/rope.js';
import { Stream, Tensor } from '../../lib/tensor.js';
import { checkMisuse, forEachIsa, normalNumbers, tensorOf } from '../support/op-harness.js';
import t, { testDevice } from '../support/testing.js';

await forEachIsa(t, import.meta.url, async () => {
  await t.test('ropeAppend turns queries, and writes turned keys and values and nothing else', async (t) => {
    const normal = normalNumbers(1);
    for (const dtype of ['f32', 'bf16', 'f16'] as const) {
      // [tokens a row, query heads, key heads, head size, columns of the table]; a head larger than what is turned too.
      for (const [T, H, G, D, half] of [
        [2, 3, 2, 6, 2],
        [1, 8, 2, 64, 32],
        [20, 2, 1, 10, 5],
      ] as const) {
        const stream = new Stream(testDevice);
        const [B, S] = [2, T + 3];
        const numbers = (n: number) => Array.from({ length: n }, () => Math.round(normal() * 64) / 64);
        const make = (shape: number[]) => tensorOf(stream, dtype, shape, numbers(shape.reduce((n, d) => n * d, 1)));
        const [q, k, v] = [make([B, T, H, D]), make([B, T, G, D]), make([B, T, G, D])];
        const table = {
          cos: tensorOf(stream, 'f32', [B * T, half], numbers(B * T * half)),
          sin: tensorOf(stream, 'f32', [B * T, half], numbers(B * T * half)),
        };
        const cache = { keys: make([B, S, G, D]), values: make([B, S, G, D]) };
        const before = [await cache.keys.read(), await cache.values.read()];
        const at = Int32Array.of(3, 1);
        const turned = ropeAppend(q, k, v, table, cache, Tensor.from(stream, at, [B]));
        const what = `${dtype}, ${T} x ${H}, ${G} x ${D}, ${half}`;
        t.same(await turned.readBits(), await rope(undefined, q, table).readBits(), `${what}: queries`);
        const rows = [await rope(undefined, k, table).read(), await v.read()];
        for (const [i, after] of [await cache.keys.read(), await cache.values.read()].entries()) {
          const token = G * D;
          const expected = (before[i] as Float32Array).map((old, n) => {
            const [b, position] = [Math.floor(n / (S * token)), Math.floor(n / token) % S];
            const place = position - (at[b] as number);
            if (place < 0 || place >= T) return old;
            return (rows[i] as Float32Array)[(b * T + place) * token + (n % token)] as number;
          });
          t.same(after, expected, `${what}: ${i ? 'values' : 'keys'}`);
        }
        await stream.close();
      }
    }
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
        const [keys, values] = [0, 1].map(() => Tensor.from(s, new Float32Array(16), [1, 4, 1, 4])) as [Tensor, Tensor];
        const rows = Tensor.from(s, new Float32Array(8), [1, 2, 1, 4]);
        const table = { cos: zeros(s, [2, 2]), sin: zeros(s, [2, 2]) };
        for (const t of [table.cos, table.sin]) s.run('fill', t, 0);
        ropeAppend(rows, rows, rows, table, { keys, values }, Tensor.from(s, Int32Array.of(3), [1]));
        return values.read();
      },
      code: 'ERR_QLORA_SHAPE',
      message: /2 tokens at 3 do not fit into a cache of 4/,
    },
    {
      name: 'a table for more than a head has',
      run: (s) => {
        const [rows, cache, table] = [zeros(s, [1, 2, 1, 4]), zeros(s, [1, 4, 1, 4]), zeros(s, [2, 3])];
        const at = new Tensor(s, 'i32', [1]);
        ropeAppend(rows, rows, rows, { cos: table, sin: table }, { keys: cache, values: cache }, at);
      },
      code: 'ERR_QLORA_SHAPE',
      message: /ropeAppend: cos has 3 columns, which turn 6 elements, but a head has only 4/,
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
