/** Several prompts at once: the texts that each gives alone, in fewer passes. */
import { join } from 'node:path';
import t from 'tap';
import { QuantizedModel } from '../../lib/index.js';
import { packageRoot } from '../support/references.js';

const demo = join(packageRoot(), 'examples', 'demo', 'model');
const prompts = [
  { instruction: 'What is 12 plus 30?' },
  'The numbers are',
  [{ role: 'user' as const, content: 'What is 7 plus 5?' }],
  'a',
  'The numbers are',
];

t.test('generateBatch', async (t) => {
  // In fp32, where rounding does not choose another token.
  await using model = await QuantizedModel.load(demo, { computeDtype: 'f32' });
  const alone = async (options: object) => {
    const texts: string[] = [];
    for (const prompt of prompts) texts.push(await model.generate(prompt, options));
    return texts;
  };

  await t.test('the texts that generate() gives', async (t) => {
    const lengths = new Set((await alone({ maxNewTokens: 40 })).map((text) => text.length));
    t.ok(lengths.size > 2, 'they end at different times');
    const long = { maxNewTokens: 40, minNewTokens: 40 };
    const whole = await model.generate('The numbers are', long);
    t.ok(whole.length > 20);
    for (const options of [
      {},
      { maxNewTokens: 1 },
      { ...long, stop: [whole.slice(6, 9)] },
      { maxNewTokens: 40, repetitionPenalty: 1.3, noRepeatNgramSize: 3, minNewTokens: 10 },
      { maxNewTokens: 20, adapter: null },
    ]) {
      t.same(await model.generateBatch(prompts, options), await alone(options), JSON.stringify(options));
    }
    const one = [prompts[0]] as { instruction: string }[];
    t.same(await model.generateBatch(one), [await model.generate(one[0] as { instruction: string })]);
    t.same(await model.generateBatch([]), []);
  });

  await t.test('with an adapter', async (t) => {
    const adapter = model.addLora('a', { r: 4 });
    for (const layer of adapter.layers) {
      await layer.write(
        'B',
        Float32Array.from({ length: layer.outFeatures * layer.r }, (_, i) => Math.sin(i) / 10),
      );
    }
    const texts = await model.generateBatch(prompts, { maxNewTokens: 12 });
    t.same(texts, await alone({ maxNewTokens: 12 }));
    t.notSame(texts, await alone({ maxNewTokens: 12, adapter: null }), 'which changes them');
    model.removeLora('a');
  });

  await t.test('sampling', async (t) => {
    const options = { doSample: true, temperature: 1.5, maxNewTokens: 30, seed: 4 };
    const texts = await model.generateBatch(prompts, options);
    t.same(await model.generateBatch(prompts, options), texts, 'the same seed, the same texts');
    t.not(texts[1], texts[4], 'each row draws for itself');
    t.notSame(await model.generateBatch(prompts, { ...options, seed: 5 }), texts);
  });

  await t.test('errors, after which nothing is left', async (t) => {
    const reason = new Error('enough');
    await t.rejects(model.generateBatch(prompts, { signal: AbortSignal.abort(reason) }), reason);
    const abort = new AbortController();
    const running = model.generateBatch(['a', 'b'], { maxNewTokens: 400, minNewTokens: 400, signal: abort.signal });
    setTimeout(() => abort.abort(reason), 20);
    await t.rejects(running, reason);
    for (const [bad, options, code, message] of [
      [prompts, { numBeams: 2 }, 'ERR_QLORA_OPTION_CONFLICT', /numBeams 1, got 2/],
      [['a', 5], {}, 'ERR_QLORA_OPTION_INVALID', /generateBatch: .*prompts/],
      ['a', {}, 'ERR_QLORA_OPTION_INVALID', /generateBatch: .*prompts/],
      [prompts, { maxNewTokes: 3 } as object, 'ERR_QLORA_OPTION_UNKNOWN', /maxNewTokes/],
      [prompts, { adapter: 'b' }, 'ERR_QLORA_ADAPTER_UNKNOWN', /'b'/],
    ] as const) {
      await t.rejects(model.generateBatch(bad as string[], options), { code, message, hint: String });
    }
    await model.core.stream.sync();
    t.equal(model.memory().byClass.activations, 0, 'caches are freed');
  });
});
