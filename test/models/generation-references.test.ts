/** Beams, penalties and lengths: texts of small models against those that transformers generates, and wrong options. */
import { join } from 'node:path';
import { BeamSearch, beamSearch } from '../../lib/generate/beams.js';
import { type GenerateOptions, resolveGenerateOptions } from '../../lib/generate/options.js';
import { endsWithStop } from '../../lib/generate/stop-strings.js';
import { generateIds } from '../../lib/generate/tokens.js';
import { QuantizedModel } from '../../lib/index.js';
import { packageRoot, readJson, referencesDir } from '../support/references.js';
import t, { testDevice } from '../support/testing.js';

interface Generated {
  model: string;
  about: string;
  prompt: number[];
  endTokens: number[];
  options: GenerateOptions & { minLength?: number; earlyStopping?: boolean | 'never' };
  ids: number[];
  score?: number;
}

const demo = join(packageRoot(), 'examples', 'demo', 'model');
const folder = referencesDir('generation');
const question = { instruction: 'What is 12 plus 30?' };

async function pieces<T>(stream: AsyncIterable<T>): Promise<T[]> {
  const all: T[] = [];
  for await (const piece of stream) all.push(piece);
  return all;
}

const { generated } = readJson<{ generated: Generated[] }>(folder, 'index.json');

for (const name of new Set(generated.map(({ model }) => model))) {
  await t.test(name, async (t) => {
    const directory = join(referencesDir('models'), name);
    await using model = await QuantizedModel.load(directory, {
      quantization: 'none',
      computeDtype: 'f32',
      device: testDevice,
    });
    for (const { about, prompt, endTokens, options, ids, score } of generated.filter((g) => g.model === name)) {
      const { minLength = 0, earlyStopping = false, ...given } = options;
      const resolved = resolveGenerateOptions(model.core, { doSample: false, ...given }, 'tokens');
      const all = { ...resolved, minLength, earlyStopping, endTokens: new Set(endTokens) };
      const text = endTokens.includes(ids.at(-1) as number) ? ids.slice(0, -1) : ids;
      if (score === undefined) {
        const made: number[] = [];
        for await (const id of generateIds(model.core, prompt, all)) made.push(id);
        t.same(made, text, about);
        continue;
      }
      const minNewTokens = all.minNewTokens ?? 0;
      const pass = { adapter: undefined, checkpointing: 'none' } as const;
      const found = await beamSearch(model.core, prompt, pass, { ...all, minNewTokens });
      t.same(found.ids, text, about);
      t.ok(Math.abs(found.score - score) < 1e-4 * Math.max(1, Math.abs(score)), `${about}: ${found.score}, ${score}`);
    }
  });
}

t.test('beams, penalties and lengths', async (t) => {
  await using model = await QuantizedModel.load(demo);
  const start = [5, 17, 33, 60];
  const likelihood = async (ids: number[]) => {
    const labels = [...start.map(() => -100), ...ids];
    return -(await model.loss([...start, ...ids], labels)) * ids.length;
  };
  const eight = { maxNewTokens: 8, ignoreEos: true };
  const greedy = await model.generateTokens(start, eight);
  const found = await model.generateTokens(start, { ...eight, numBeams: 6, lengthPenalty: 0 });
  t.equal(found.length, 8);
  t.ok((await likelihood(found)) >= (await likelihood(greedy)) - 0.02, 'beams find what is at least as likely');

  const options = { numBeams: 3, maxNewTokens: 12 };
  const text = await model.generate(question, options);
  t.equal((await pieces(model.generate(question, options))).join(''), text, 'the stream gives it when it is whole');
  t.match(text, /42/);

  const ids = await model.generateTokens(start, { maxNewTokens: 20, noRepeatNgramSize: 1, ignoreEos: true });
  t.equal(new Set([...start, ...ids]).size, 24, 'no token twice');
  const { tokenizer } = model.core;
  if (!tokenizer) return t.fail('no tokenizer');
  t.ok(tokenizer.encode(await model.generate(question, { minNewTokens: 6 })).length >= 5, 'at least so long');

  const sampled = { numBeams: 3, doSample: true, temperature: 2, topK: 0, maxNewTokens: 10, ignoreEos: true };
  const draws = await Promise.all([1, 1, 2, 3].map((seed) => model.generateTokens(start, { ...sampled, seed })));
  t.same(draws[0], draws[1], 'the same seed, the same text');
  t.ok(
    draws.slice(2).some((ids) => `${ids}` !== `${draws[0]}`),
    'another seed, another text',
  );

  await t.test('a stop string ends a beam', async (t) => {
    const open = { numBeams: 3, maxNewTokens: 40, minNewTokens: 40 };
    const long = await model.generate('The numbers are', open);
    const stop = long.slice(6, 9);
    const cut = await model.generate('The numbers are', { ...open, stop: [stop, 'never there'] });
    t.notMatch(cut, stop);
    const encoded = tokenizer.encode('one two three');
    t.equal(endsWithStop(tokenizer, ['three'], encoded), true);
    t.equal(endsWithStop(tokenizer, ['two x'], encoded), false);
    t.equal(endsWithStop(tokenizer, [], encoded), false);
    const search = new BeamSearch({
      numBeams: 2,
      maxNewTokens: 9,
      lengthPenalty: 1,
      earlyStopping: false,
      endTokens: new Set([0]),
      isWhole: (ids) => ids.at(-1) === 7,
    });
    t.same(search.advance([7, 5, 0, 6].map((id, i) => ({ beam: 0, id, score: -1 - i }))), [0, 0]);
    t.same(search.whole, [{ ids: [7], score: -1 }], 'what is not among the best is only there to go on with');
    t.same(
      search.growing.map(({ ids, score }) => ({ ids, score })),
      [
        { ids: [5], score: -2 },
        { ids: [6], score: -4 },
      ],
    );
    t.same(
      search.advance([{ beam: 1, id: 7, score: -4.5 }, ...[1, 2].map((id) => ({ beam: 0, id, score: -5 }))]),
      [0, 0],
    );
    t.same(
      [search.whole, search.done],
      [
        [
          { ids: [7], score: -1 },
          { ids: [6, 7], score: -2.25 },
        ],
        true,
      ],
      'and nothing that grows could be better than -2.25',
    );
  });

  await t.test('aborted', async (t) => {
    const abort = new AbortController();
    const reason = new Error('enough');
    const running = model.generateTokens(start, {
      numBeams: 4,
      maxNewTokens: 400,
      ignoreEos: true,
      signal: abort.signal,
    });
    setTimeout(() => abort.abort(reason), 20);
    t.equal(await running.catch((e: unknown) => e), reason);
    await model.core.stream.sync();
    t.equal(model.memory().byClass.activations, 0, 'caches are freed');
  });

  await t.test('options that cannot be', async (t) => {
    for (const [wrong, message] of [
      [{ numBeams: 0 }, /'numBeams': .*>=1, got 0/],
      [{ numBeams: 1.5 }, /'numBeams': .*int.*, got 1.5/],
      [{ typicalP: 0 }, /'typicalP': .*>0, got 0/],
      [{ typicalP: 1.1 }, /'typicalP': .*<=1, got 1.1/],
      [{ repetitionPenalty: 0 }, /'repetitionPenalty': .*>0, got 0/],
      [{ noRepeatNgramSize: -1 }, /'noRepeatNgramSize': .*>=0, got -1/],
      [{ minNewTokens: -1 }, /'minNewTokens': .*>=0, got -1/],
      [{ lengthPenalty: '1' }, /'lengthPenalty': .*number, got "1"/],
    ] as const) {
      const expected = { name: 'QLoRAError', code: 'ERR_QLORA_OPTION_INVALID', message, hint: String };
      await t.rejects(async () => model.generate('a', wrong as object), expected, JSON.stringify(wrong));
      await t.rejects(async () => model.generateTokens([1], wrong as object), expected);
    }
    await t.rejects(async () => model.generate('a', { minNewTokens: 9, maxNewTokens: 8 }), {
      code: 'ERR_QLORA_OPTION_CONFLICT',
      message: /minNewTokens must be at most maxNewTokens, 8, got 9/,
      hint: String,
    });
    await t.rejects(
      async () => model.generateTokens(start, { noRepeatNgramSize: 1, maxNewTokens: 600, ignoreEos: true }),
      {
        code: 'ERR_QLORA_NO_TOKEN_LEFT',
        message: /every token of row 0 is forbidden; noRepeatNgramSize/,
      },
    );
  });
});
