/** Text and tokens: greedy, sampled, streamed, stopped; which adapter and which template. */
import { cpSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import t from 'tap';
import { promptTemplate } from '../../lib/data/templates.js';
import { StopStrings } from '../../lib/generate/stop-strings.js';
import { QuantizedModel, setLogger } from '../../lib/index.js';
import { packageRoot, referencesDir } from '../support/references.js';

const demo = join(packageRoot(), 'examples', 'demo', 'model');
const llama3 = join(referencesDir('models'), 'llama3');
const question = { instruction: 'What is 12 plus 30?' };
const { source, tail } = promptTemplate('alpaca');
const prompt = source(question) + tail;

const unhandled: unknown[] = [];
process.on('unhandledRejection', (reason) => unhandled.push(reason));

async function pieces<T>(stream: AsyncIterable<T>): Promise<T[]> {
  const all: T[] = [];
  for await (const piece of stream) all.push(piece);
  return all;
}

t.test('text', async (t) => {
  await using model = await QuantizedModel.load(demo);
  const answer = await model.generate(question);
  t.equal(answer, '42', 'ends at EOS, which is not part of the text');
  t.equal(await model.generate(prompt), answer, 'an instruction goes through the template');
  t.equal(
    await model.generate([{ role: 'user', content: question.instruction }]),
    answer,
    'and messages through theirs',
  );

  await t.test('greedy', async (t) => {
    for (const options of [
      { temperature: 0, doSample: true },
      { topK: 1, doSample: true, seed: 9 },
      { doSample: false, temperature: 5 },
    ]) {
      t.equal(await model.generate(question, options), answer, JSON.stringify(options));
    }
    const start = [5, 17, 33, 60];
    const ids = await model.generateTokens(start, { maxNewTokens: 12, ignoreEos: true });
    const repeated: number[] = [];
    for (let i = 0; i < 12; i++) {
      const logits = await model.logits([...start, ...repeated]);
      const last = logits.subarray(-512);
      repeated.push(last.indexOf(Math.max(...last)));
    }
    // bf16 and a cache: what is equal is the choice, but where two logits are as good as equal.
    t.same(ids, repeated, 'the likeliest token again and again');
    t.equal(ids.length, 12);
  });

  await t.test('streaming', async (t) => {
    const options = { doSample: true, temperature: 1.5, maxNewTokens: 40, seed: 4 };
    const whole = await model.generate('The numbers are', options);
    const streamed = await pieces(model.generate('The numbers are', options));
    t.equal(streamed.join(''), whole);
    t.ok(streamed.length > 3 && streamed.every((piece) => piece !== ''), 'in pieces');
    const both = model.generate('The numbers are', options);
    t.equal((await pieces(both)).join(''), await both, 'iterated and awaited');
    const ids = model.generateTokens([5, 17], { ...options, ignoreEos: true });
    t.same(await pieces(ids), await model.generateTokens([5, 17], { ...options, ignoreEos: true }));
    t.same(await model.generate('The numbers are', options), whole, 'the same seed, the same text');
    const others = await Promise.all([5, 6, 7].map((seed) => model.generate('The numbers are', { ...options, seed })));
    t.ok(
      others.some((text) => text !== whole),
      'another seed, another text',
    );
  });

  await t.test('leaving the loop and aborting', async (t) => {
    let count = 0;
    for await (const _ of model.generateTokens([5, 17], { maxNewTokens: 200, ignoreEos: true }))
      if (++count === 3) break;
    t.equal(count, 3);
    await model.core.stream.sync();
    await sleep(20);
    await model.core.stream.sync();
    t.equal(model.memory().byClass.activations, 0, 'its cache is freed');
    const reason = new Error('enough');
    t.equal(await model.generate(question, { signal: AbortSignal.abort(reason) }).catch((e: unknown) => e), reason);
    const abort = new AbortController();
    const seen: number[] = [];
    const failed = await (async () => {
      for await (const id of model.generateTokens([5], { maxNewTokens: 200, ignoreEos: true, signal: abort.signal })) {
        seen.push(id);
        if (seen.length === 4) abort.abort(reason);
      }
    })().catch((e: unknown) => e);
    t.equal(failed, reason);
    t.ok(seen.length >= 4 && seen.length < 10, 'stops at once');
  });

  await t.test('stop strings', async (t) => {
    const options = { maxNewTokens: 60, doSample: true, temperature: 1.2, seed: 11, topK: 0 };
    const whole = await model.generate('The numbers are', options);
    t.ok(whole.length > 20, whole);
    const middle = Math.floor(whole.length / 2);
    for (const length of [1, 3, 8]) {
      const stop = whole.slice(middle, middle + length);
      const cut = await model.generate('The numbers are', { ...options, stop: ['never there', stop] });
      t.equal(cut, whole.slice(0, whole.indexOf(stop)), `${JSON.stringify(stop)} is not given out`);
      t.equal(
        (await pieces(model.generate('The numbers are', { ...options, stop: [stop] }))).join(''),
        cut,
        'nor in pieces',
      );
    }
    // What looked like the start of a stop string is given out after all.
    t.equal(await model.generate('The numbers are', { ...options, stop: [`${whole.slice(-3)}X`] }), whole);
  });

  await t.test('stop strings among ids', async (t) => {
    const { tokenizer } = model.core;
    if (!tokenizer) return t.fail('no tokenizer');
    const prompt = tokenizer.encode('The numbers are');
    const text = (ids: readonly number[]) => {
      const decoder = tokenizer.stream({ context: prompt });
      return ids.map((id) => decoder.push(id)).join('');
    };
    for (const numBeams of [1, 3]) {
      const options = { maxNewTokens: 60, doSample: true, temperature: 1.2, seed: 11, topK: 0, numBeams };
      const all = await model.generateTokens(prompt, options);
      const whole = text(all);
      const middle = Math.floor(whole.length / 2);
      for (const length of numBeams === 1 ? [1, 3, 8] : [3]) {
        const stop = whole.slice(middle, middle + length);
        const cut = await model.generateTokens(prompt, { ...options, stop: ['never there', stop] });
        if (numBeams > 1) {
          t.notOk(text(cut).includes(stop), 'of beams as well');
          continue;
        }
        const before = whole.indexOf(stop);
        t.same(cut, all.slice(0, cut.length), 'those of the same text');
        t.ok(text(cut).length <= before && text(all.slice(0, cut.length + 1)).length > before, JSON.stringify(stop));
        t.same(await pieces(model.generateTokens(prompt, { ...options, stop: [stop] })), cut, 'one by one as well');
      }
    }
    // A stop string that begins where a token does.
    const greedy = { maxNewTokens: 12, ignoreEos: true };
    const ids = await model.generateTokens(prompt, greedy);
    const starts = [1, 2, 3, 4, 5, 6].map((n) => [n, text(ids.slice(0, n)).length] as const);
    const [n, start] = starts.find(([, at]) => text(ids).indexOf(text(ids).slice(at)) === at) ?? [0, 0];
    t.ok(start > 0);
    t.same(await model.generateTokens(prompt, { ...greedy, stop: [text(ids).slice(start)] }), ids.slice(0, n));
    const options = { maxNewTokens: 20, ignoreEos: true };
    const all = await model.generateTokens(prompt, options);
    t.same(await model.generateTokens(prompt, { ...options, stop: [`${text(all).slice(-3)}X`] }), all, 'none is lost');
  });

  await t.test('options of sampling where nothing is sampled', async (t) => {
    const said: string[] = [];
    setLogger((level, message) => said.push(`${level}: ${message}`));
    t.teardown(() => setLogger(null));
    const options = { maxNewTokens: 1, temperature: 0.7, topP: 0.9, topK: 5, seed: 3 };
    await model.generate('a', { ...options, doSample: true });
    await model.generate('a', { maxNewTokens: 1, temperature: 0 });
    t.same(said, []);
    await model.generate('a', options);
    t.same(
      said.map((line) => /^warn: option '(\w+)' changes nothing without doSample/.exec(line)?.[1]),
      ['temperature', 'topK', 'topP'],
    );
  });

  await t.test('which adapter', async (t) => {
    const base = await model.generate(question);
    model.addLora('one', { r: 2 });
    t.equal(await model.generate(question), base, 'the only one, which changes nothing yet');
    model.addLora('two', { r: 2 });
    for (const layer of model.adapters.get('two')?.layers ?? []) {
      await layer.write('B', new Float32Array(layer.outFeatures * layer.r).fill(0.3));
    }
    const required = { code: 'ERR_QLORA_ADAPTER_REQUIRED', message: /one, two/, hint: String };
    await t.rejects(async () => model.generate(question), required);
    await t.rejects(model.logits([1]), required);
    await t.rejects(model.loss([1, 2]), required);
    t.equal(await model.generate(question, { adapter: null }), base, 'null is the base');
    t.equal(await model.generate(question, { adapter: 'one' }), base);
    t.notSame(await model.logits([5, 6], { adapter: 'two' }), await model.logits([5, 6], { adapter: null }));
    const unknown = { code: 'ERR_QLORA_ADAPTER_UNKNOWN', message: /'tow'/, hint: /one, two/ };
    await t.rejects(async () => model.generate(question, { adapter: 'tow' }), unknown);
    t.throws(() => model.removeLora('tow'), unknown);
    model.removeLora('two');
    // What it was trained with decides how an instruction is written.
    const one = model.adapters.get('one');
    if (!one) return t.fail('gone');
    one.training = { template: 'alpaca-llama-factory' };
    const other = promptTemplate('alpaca-llama-factory');
    const options = { maxNewTokens: 10, doSample: true, temperature: 2, seed: 5 };
    t.equal(
      await model.generate(question, options),
      await model.generate(other.source(question) + other.tail, options),
    );
    t.not(await model.generate(question, options), await model.generate(question, { ...options, adapter: null }));
    model.removeLora('one');
  });

  await t.test('errors, of which none goes unhandled', async (t) => {
    const wrongStop = { stop: 'a' as unknown as string[] };
    const unknownOption = {
      code: 'ERR_QLORA_OPTION_UNKNOWN',
      message: /generate.*maxNewTokes/,
      hint: /Did you mean 'maxNewTokens'/,
    };
    await t.rejects(async () => model.generate('a', { maxNewTokes: 3 } as object), unknownOption);
    await t.rejects(pieces(model.generate('a', { maxNewTokes: 3 } as object)), unknownOption);
    await t.rejects(pieces(model.generateTokens([1], { maxNewTokes: 3 } as object)), unknownOption);
    for (const ask of [() => model.generate('a', wrongStop), () => model.generateTokens([1], wrongStop)]) {
      await t.rejects(async () => ask(), { code: 'ERR_QLORA_OPTION_INVALID', hint: 'Write ["a"].' });
    }
    await t.rejects(async () => model.generateTokens([]), { code: 'ERR_QLORA_ARGUMENT', hint: String });
    for (const wrong of [
      5,
      null,
      [],
      [{ role: 'robot', content: 'x' }],
      [{ role: 'user' }],
      { instrction: 'x' },
      { instruction: 3 },
    ]) {
      const code = /^ERR_QLORA_OPTION_/;
      const error = await (model.generate(wrong as unknown as string) as Promise<unknown>).catch((e: unknown) => e);
      t.match(error, { name: 'QLoRAError', code, message: /^generate: .*prompt/, hint: String }, JSON.stringify(wrong));
    }
    await sleep(5);
    t.same(unhandled, []);
  });
});

t.test('stop strings, wherever the pieces are cut', (t) => {
  const cases: [text: string, stops: string[], before: string][] = [
    ['one two three', ['two'], 'one '],
    ['aaab rest', ['aab'], 'a'],
    ['abcabd!', ['abd'], 'abc'],
    ['no end', ['END', 'x'], 'no end'],
    ['both xy and x', ['y', 'xy'], 'both '],
    ['ends with a star', ['stars'], 'ends with a star'],
  ];
  for (const [text, stops, before] of cases) {
    for (const size of [1, 2, 3, 100]) {
      const stop = new StopStrings(stops);
      let got = '';
      for (let i = 0; i < text.length; i += size) got += stop.push(text.slice(i, i + size));
      t.equal(got + stop.finish(), before, `${text}, ${size} at once`);
      t.equal(stop.found, before !== text);
    }
  }
  t.end();
});

t.test('generation_config.json', async (t) => {
  const directory = t.testdir();
  cpSync(llama3, directory, { recursive: true });
  const configure = (change: object) =>
    writeFileSync(join(directory, 'generation_config.json'), JSON.stringify({ eos_token_id: [4, 5, 6], ...change }));
  configure({});
  await using plain = await QuantizedModel.load(directory);
  const all = await plain.generateTokens([9, 8, 7], { maxNewTokens: 30, ignoreEos: true });
  for (const at of [2, 9]) {
    const end = all[at] as number;
    configure({ eos_token_id: [205, end] });
    await using model = await QuantizedModel.load(directory);
    t.same(
      await model.generateTokens([9, 8, 7], { maxNewTokens: 30 }),
      all.slice(0, all.indexOf(end)),
      'each of the end tokens ends it',
    );
  }
  configure({ do_sample: true, temperature: 0.9, max_new_tokens: 7 });
  await using sampling = await QuantizedModel.load(directory);
  const sampled = await sampling.generateTokens([9, 8, 7], { ignoreEos: true, topK: 0 });
  t.equal(sampled.length, 7, 'its length holds');
  t.same(
    await plain.generateTokens([9, 8, 7], {
      ignoreEos: true,
      topK: 0,
      doSample: true,
      temperature: 0.9,
      maxNewTokens: 7,
    }),
    sampled,
  );
  t.same(
    await sampling.generateTokens([9, 8, 7], { ignoreEos: true, doSample: false }),
    all.slice(0, 7),
    'an option wins',
  );

  // What the file says is what the options would.
  const settings = { maxNewTokens: 20, repetitionPenalty: 1.4, noRepeatNgramSize: 2, numBeams: 3, lengthPenalty: -0.5 };
  const snake = (name: string) => name.replace(/[A-Z]/g, (c) => `_${c.toLowerCase()}`);
  configure(Object.fromEntries(Object.entries(settings).map(([name, value]) => [snake(name), value])));
  await using beams = await QuantizedModel.load(directory);
  t.same(await beams.generateTokens([9, 8, 7]), await plain.generateTokens([9, 8, 7], settings));
  t.same(
    await beams.generateTokens([9, 8, 7], { numBeams: 1, repetitionPenalty: 1, noRepeatNgramSize: 0, ignoreEos: true }),
    all.slice(0, 20),
  );
  const end = all[4] as number;
  configure({ eos_token_id: end, min_length: 3 + 7, early_stopping: true });
  await using longer = await QuantizedModel.load(directory);
  const made = await longer.generateTokens([9, 8, 7], { maxNewTokens: 30 });
  t.ok(made.length >= 7, 'min_length counts the prompt');
  t.equal(longer.core.generation.earlyStopping, true);
  t.equal(
    (await longer.generateTokens([9, 8, 7], { minNewTokens: 0 })).length,
    all.indexOf(end),
    'minNewTokens takes its place',
  );
  for (const [change, code, message] of [
    [{ penalty_alpha: 0.6 }, 'ERR_QLORA_GENERATION_CONFIG', /penalty_alpha/],
    [{ num_beam_groups: 2 }, 'ERR_QLORA_GENERATION_CONFIG', /num_beam_groups/],
    [{ bad_words_ids: [[5]] }, 'ERR_QLORA_GENERATION_CONFIG', /bad_words_ids/],
    [{ typical_p: 0 }, 'ERR_QLORA_OPTION_INVALID', /generation_config.json: option 'typicalP': .*>0, got 0/],
    [{ num_beams: 0 }, 'ERR_QLORA_OPTION_INVALID', /generation_config.json: option 'numBeams'/],
    [{ min_new_tokens: 300 }, 'ERR_QLORA_OPTION_CONFLICT', /at most maxNewTokens, 256, got 300/],
  ] as const) {
    configure(change);
    await using refused = await QuantizedModel.load(directory);
    await t.rejects(async () => refused.generateTokens([9]), { code, message, hint: String }, JSON.stringify(change));
  }
  configure({ penalty_alpha: null, bad_words_ids: [], num_beam_groups: 1, diversity_penalty: 0, use_cache: true });
  await using neutral = await QuantizedModel.load(directory);
  t.equal((await neutral.generateTokens([9], { maxNewTokens: 2, ignoreEos: true })).length, 2, 'what changes nothing');
});

t.test('without a tokenizer, and without a chat template', async (t) => {
  await using bare = await QuantizedModel.load(llama3);
  await t.rejects(async () => bare.generate('Hello'), {
    code: 'ERR_QLORA_TOKENIZER_MISSING',
    message: /llama3 has no tokenizer\.json/,
    hint: /generateTokens/,
  });
  const directory = t.testdir();
  cpSync(demo, directory, { recursive: true });
  const path = join(directory, 'tokenizer_config.json');
  const { chat_template: _, ...config } = JSON.parse(readFileSync(path, 'utf8')) as Record<string, unknown>;
  writeFileSync(path, JSON.stringify(config));
  await using model = await QuantizedModel.load(directory);
  const error = await model.generate([{ role: 'user', content: 'Hello' }]).catch((e: unknown) => e);
  t.match(error, { name: 'QLoRAError', code: /^ERR_QLORA_CHAT_TEMPLATE/, message: /chat template/, hint: String });
  t.equal(await model.generate(question), '42', 'what needs none works');
});
