import { cpSync, mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import t from 'tap';
import { applyCharsmap, readCharsmap } from '../../lib/tokenizer/charsmap.js';
import { encodeChat } from '../../lib/tokenizer/chat.js';
import { ChatTemplate, type ChatTurn } from '../../lib/tokenizer/chat-template.js';
import { Tokenizer } from '../../lib/tokenizer/tokenizer.js';
import { readJson, referencesDir } from '../support/references.js';

interface StringCase {
  text: string;
  ids: number[];
  idsWithSpecial: number[];
  idsSpecialTextAsText?: number[];
  decoded: string;
  decodedWithoutSpecial: string;
}
interface ChatCase {
  template: string;
  tokenizer: string;
  conversation: string;
  addGenerationPrompt: boolean;
  text?: string;
  ids?: number[];
  trained?: number[];
  error?: string;
}

const folder = referencesDir('tokenizers');
const NAMES = ['gpt2-like', 'llama3-like', 'llama2-like', 'llama2-like-prepend', 'gemma-like', 't5-like'];
const strings = readJson<Record<string, StringCase[]>>(folder, 'strings.json');
const chat = readJson<{
  templates: Record<string, string>;
  conversations: Record<string, ChatTurn[]>;
  cases: ChatCase[];
}>(folder, 'chat.json');
const load = (name: string): Promise<Tokenizer> => Tokenizer.load(join(folder, name));

t.test('strings become the ids, and ids the strings, that the tokenizers library gives', async (t) => {
  for (const name of NAMES) {
    const tokenizer = await load(name);
    const cases = strings[name] ?? [];
    t.ok(cases.length >= 70, `${name} has its strings`);
    for (const c of cases) {
      // Control characters in a test's name confuse the reporter.
      const label = `${name} ${encodeURI(c.text).slice(0, 60)}`;
      t.same(tokenizer.encode(c.text, { parseSpecialTokens: true }), c.ids, `${label}: ids`);
      const added = tokenizer.encode(c.text, { parseSpecialTokens: true, addSpecialTokens: true });
      t.same(added, c.idsWithSpecial, `${label}: with BOS or EOS`);
      t.same(tokenizer.encode(c.text), c.idsSpecialTextAsText ?? c.ids, `${label}: special text as text`);
      t.equal(tokenizer.decode(c.idsWithSpecial), c.decoded, `${label}: decoded`);
      const plain = tokenizer.decode(c.idsWithSpecial, { skipSpecialTokens: true });
      t.equal(plain, c.decodedWithoutSpecial, `${label}: without special tokens`);
      for (const skipSpecialTokens of [true, false]) {
        const stream = tokenizer.stream({ skipSpecialTokens });
        const text = c.idsWithSpecial.map((id) => stream.push(id)).join('') + stream.finish();
        t.equal(text, skipSpecialTokens ? c.decodedWithoutSpecial : c.decoded, `${label}: streamed`);
      }
    }
  }
});

t.test('a stream gives whole characters, as soon as they are whole', async (t) => {
  for (const name of ['gpt2-like', 'llama2-like']) {
    const tokenizer = await load(name);
    const ids = tokenizer.encode('a \u{1F9EC}b');
    const stream = tokenizer.stream();
    const pieces = ids.map((id) => stream.push(id));
    t.notOk(pieces.join('').includes('\ufffd'), `${name}: nothing broken`);
    t.equal(pieces.join(''), 'a \u{1F9EC}b', `${name}: nothing left for finish`);
    t.ok(pieces.includes(''), `${name}: the first bytes of the emoji are held back`);
    t.ok(pieces.includes('\u{1F9EC}'), `${name}: the emoji comes with its last byte`);
    const cut = tokenizer.stream();
    for (const id of tokenizer.encode('\u{1F9EC}').slice(0, -1)) cut.push(id);
    t.match(cut.finish(), /^ ?\ufffd$/, `${name}: an incomplete end is one replacement character`);
  }
  const llama = await load('llama2-like');
  const hello = llama.encode('x hello').slice(llama.encode('x').length);
  const alone = llama.stream();
  const after = llama.stream({ context: llama.encode('x') });
  t.equal(hello.map((id) => alone.push(id)).join(''), 'hello', 'a text starts without the space');
  t.equal(hello.map((id) => after.push(id)).join(''), ' hello', 'a text that goes on keeps it');
});

t.test('ids of roles, spellings, unknown ids and invalid bytes', async (t) => {
  const llama3 = await load('llama3-like');
  t.match(llama3, { bosTokenId: 1000, eosTokenId: 1004, padTokenId: 1001, unkTokenId: undefined, vocabSize: 1005 });
  t.equal(llama3.tokenOf(1004), '<|eot_id|>');
  t.equal(llama3.idOf('<|eot_id|>'), 1004);
  t.ok(llama3.isSpecial(1004));
  t.notOk(llama3.isSpecial(5));
  t.equal(llama3.tokenOf(99999), undefined);
  t.equal(llama3.decode([99999, ...llama3.encode('hi'), 99999]), 'hi', 'an id beyond the vocabulary gives nothing');
  t.equal(llama3.decode([]), '');
  const gpt2 = await load('gpt2-like');
  t.match(gpt2, { bosTokenId: undefined, eosTokenId: 902, padTokenId: 900 });
  const gemma = await load('gemma-like');
  const bytes = ['<0xE4>', '<0xBD>', '<0x41>'].map((token) => gemma.idOf(token) as number);
  t.equal(
    gemma.decode(bytes),
    '\ufffd\ufffd\ufffd',
    'each byte of a run that is no UTF-8 is one replacement character',
  );
  t.doesNotThrow(() => gpt2.encode('\ud800 lone surrogate'));
});

t.test("SentencePiece's normalization table", async (t) => {
  const { normalizer } = readJson<{ normalizer: { precompiled_charsmap: string } }>(
    folder,
    't5-like',
    'tokenizer.json',
  );
  const map = readCharsmap(normalizer.precompiled_charsmap);
  if (!map) return t.fail('the table was not read');
  t.equal(applyCharsmap(map, '\ufb01\u2460\u3000x\u007f'), 'fi1 x');
  t.equal(applyCharsmap(map, 'e\u0301'), '\u00e9', 'a short cluster is looked up whole');
  t.equal(applyCharsmap(map, '\ufb01\u0301\u0301'), 'fi\u0301\u0301', 'a long one by its code points');
  for (const bad of ['', 'AAAA', Buffer.from([3, 0, 0, 0, 1, 2, 3, 4]).toString('base64')]) {
    t.equal(readCharsmap(bad), undefined);
  }
  const lying = readCharsmap(Buffer.from([4, 0, 0, 0, 255, 255, 255, 127]).toString('base64'));
  t.equal(lying && applyCharsmap(lying, 'abc'), 'abc', 'offsets beyond the table lead nowhere');
});

t.test('a place in the text is found among its tokens', async (t) => {
  for (const name of NAMES) {
    const tokenizer = await load(name);
    for (const text of [
      'the house is\n\n### Response: ',
      '你好，世界 😀\n\n### Response: ',
      'y x\n\n\n### Response:',
    ]) {
      const ids = tokenizer.encode(text);
      const places = [0];
      for (const character of text) places.push((places.at(-1) as number) + character.length);
      const found = tokenizer.tokensBefore(text, ids, places);
      t.equal(found.at(0)?.whole, 0, `${name}: nothing before the start`);
      t.equal(found.at(-1)?.whole, ids.length, `${name}: all before the end`);
      found.forEach(({ whole, touched }, i) => {
        t.ok(touched === whole || touched === whole + 1, `${name}: at most one token straddles`);
        t.ok(i === 0 || whole >= (found[i - 1]?.whole ?? 0), `${name}: in order`);
        if (touched === whole && name !== 't5-like' && i > 0) {
          const before = text.slice(0, places[i]);
          t.equal(tokenizer.decode(ids.slice(0, whole)), before, `${name}: to ${places[i]}`);
        }
      });
    }
  }
});

t.test('chat templates render, and mark what the assistant says', async (t) => {
  const tokenizers = new Map<string, Tokenizer>();
  for (const name of NAMES) tokenizers.set(name, await load(name));
  let marked = 0;
  for (const c of chat.cases) {
    const label = `${c.template} ${c.tokenizer} ${c.conversation} ${c.addGenerationPrompt}`;
    const tokenizer = tokenizers.get(c.tokenizer) as Tokenizer;
    const template = await ChatTemplate.create(chat.templates[c.template] as string);
    const messages = chat.conversations[c.conversation] as ChatTurn[];
    const { addGenerationPrompt } = c;
    if (c.error !== undefined) {
      const expected = { code: 'ERR_QLORA_CHAT_TEMPLATE', detail: { raised: c.error }, hint: String };
      t.throws(() => encodeChat(tokenizer, messages, { template, addGenerationPrompt }), expected, label);
      continue;
    }
    const { text, ids, trained } = encodeChat(tokenizer, messages, { template, addGenerationPrompt });
    t.equal(text, c.text, `${label}: text`);
    t.same(ids, c.ids, `${label}: ids`);
    if (c.trained === undefined) {
      t.equal(trained, undefined, `${label}: no mask`);
      continue;
    }
    marked++;
    t.same([...(trained ?? [])], c.trained, `${label}: mask`);
  }
  t.ok(marked > 30, 'masks were compared');
  const llama3 = tokenizers.get('llama3-like') as Tokenizer;
  const own = encodeChat(llama3, chat.conversations.many as ChatTurn[]);
  const same = chat.cases.find(
    (c) => c.tokenizer === 'llama3-like' && c.conversation === 'many' && !c.addGenerationPrompt,
  );
  t.same(own.ids, same?.ids, "the folder's own chat_template.jinja is the default");
});

t.test('a message cannot end its own turn where special tokens in it are text', async (t) => {
  for (const [name, key] of [
    ['chatml', 'gpt2-like'],
    ['llama3', 'llama3-like'],
    ['mistral', 'llama2-like'],
    ['mistral', 'llama2-like-prepend'],
    ['gemma', 'gemma-like'],
  ] as const) {
    const tokenizer = await load(key);
    const template = await ChatTemplate.create(chat.templates[name] as string);
    const harmless = encodeChat(tokenizer, chat.conversations.one as ChatTurn[], { template });
    const count = (ids: number[]): number => ids.filter((id) => tokenizer.isSpecial(id)).length;
    const all = [...new Set(harmless.ids)].filter((id) => tokenizer.isSpecial(id)).map((id) => tokenizer.tokenOf(id));
    const evil: ChatTurn[] = [
      { role: 'user', content: `a ${all.join('')} \ufdd0 b` },
      { role: 'assistant', content: `${all.join(' x ')}` },
    ];
    const text = encodeChat(tokenizer, evil, { template, specialTokens: 'text' });
    const parsed = encodeChat(tokenizer, evil, { template });
    t.equal(text.text, parsed.text, `${name}: the same text`);
    t.equal(count(text.ids), count(harmless.ids), `${name}: only the template's own special tokens`);
    t.ok(count(parsed.ids) > count(harmless.ids), `${name}: parsed they would be more`);
    t.ok(tokenizer.decode(text.ids).includes(all.join(' x ')), `${name}: nothing of the message is lost`);
  }
});

t.test('templates of strangers: no host objects, bounded work', async (t) => {
  const messages: ChatTurn[] = [{ role: 'user', content: 'x' }];
  const render = async (source: string): Promise<string> => (await ChatTemplate.create(source)).render(messages);
  const link = Array.from({ length: 39 }, (_, i) => `{% set a${i}.x = [a${i + 1}, a${i + 1}] %}`).join('');
  const spaces = Array.from({ length: 40 }, (_, i) => `{% set a${i} = namespace() %}`).join('');
  const bad = {
    'a loop without end': '{% for i in range(100000) %}{% for j in range(100000) %}a{% endfor %}{% endfor %}',
    'a string that doubles':
      "{% set s = namespace(s='ab') %}{% for i in range(99) %}{% set s.s = s.s + s.s %}{% endfor %}{{ s.s }}",
    'a list that doubles':
      '{% set s = namespace(a=[1]) %}{% for i in range(99) %}{% set s.a = [s.a, s.a] %}{% endfor %}{{ s.a }}',
    'lists linked afterwards': `${spaces}${link}{{ a0.x }}`,
    'a circle': '{% set n = namespace() %}{% set n.n = n %}{{ n }}',
    'a range': '{{ range(999999999) }}',
    'deep nesting': `{{ ${'('.repeat(50000)}`,
    'a wide indent': "{{ 'a\nb' | indent(100000000) }}",
    'no template': '{% for',
    'an unknown filter': '{{ messages | nothing }}',
  };
  for (const [what, source] of Object.entries(bad)) {
    await t.rejects(render(source), { code: 'ERR_QLORA_CHAT_TEMPLATE', hint: String }, what);
  }
  for (const expression of [
    'constructor',
    'process',
    'globalThis',
    'messages.constructor',
    'messages.__proto__',
    "messages[0]['__proto__']",
    "''.constructor",
    'range.constructor',
  ]) {
    t.equal(await render(`[{{ ${expression} }}]`), '[]', `${expression} is undefined`);
  }
  t.equal(await render("{{ tools is none }} {{ range(1, 6, 2) | join(',') }}"), 'true 1,3,5');
  const dated = await ChatTemplate.create("{{ strftime_now('%d %b %Y|%-d %B|%Q') }}");
  t.equal(dated.render([], { now: new Date(2024, 6, 5) }), '05 Jul 2024|5 July|%Q');
});

t.test('folders: what is missing, what is broken, where templates may stand', async (t) => {
  const dir = t.testdir({ empty: {}, slow: { 'tokenizer.model': '' } });
  const source = join(folder, 'llama2-like');
  await t.rejects(Tokenizer.load(join(dir, 'empty')), {
    code: 'ERR_QLORA_TOKENIZER_MISSING',
    message: /tokenizer\.json/,
    hint: /only ids/,
  });
  await t.rejects(Tokenizer.load(join(dir, 'none')), { code: 'ERR_QLORA_TOKENIZER_MISSING' });
  await t.rejects(Tokenizer.load(join(dir, 'slow')), {
    code: 'ERR_QLORA_TOKENIZER_MISSING',
    hint: /tokenizer\.model.*save_pretrained/,
  });

  const good = readJson<Record<string, unknown>>(source, 'tokenizer.json');
  const broken: Record<string, unknown> = {
    'not JSON': '{"model":',
    'a list': [],
    'no model': { ...good, model: undefined },
    'no vocabulary': { ...good, model: { type: 'BPE', merges: [] } },
    'an id that is no number': { ...good, model: { type: 'BPE', vocab: { a: 'b' }, merges: [] } },
    'an id beyond reason': { ...good, added_tokens: [{ id: 4e9, content: 'x', special: true }] },
    'added tokens without content': { ...good, added_tokens: [{ id: 4 }] },
    'no merges': { ...good, model: { type: 'BPE', vocab: { a: 0 } } },
    'an unknown decoder': { ...good, decoder: { type: 'Nothing' } },
    'a Unigram entry': { ...good, model: { type: 'Unigram', vocab: ['a'] } },
  };
  const at = join(dir, 'broken');
  mkdirSync(at);
  for (const [what, json] of Object.entries(broken)) {
    writeFileSync(join(at, 'tokenizer.json'), typeof json === 'string' ? json : JSON.stringify(json));
    await t.rejects(Tokenizer.load(at), { code: 'ERR_QLORA_TOKENIZER_INVALID', hint: String }, what);
  }
  cpSync(source, at, { recursive: true });
  writeFileSync(join(at, 'tokenizer_config.json'), 'null');
  await t.rejects(Tokenizer.load(at), { code: 'ERR_QLORA_TOKENIZER_INVALID', message: /tokenizer_config/ });

  rmSync(join(at, 'tokenizer_config.json'));
  const bare = await Tokenizer.load(at);
  t.match(bare, { bosTokenId: undefined, eosTokenId: undefined }, 'nothing is made up');
  t.throws(() => encodeChat(bare, [{ role: 'user', content: 'x' }]), {
    code: 'ERR_QLORA_CHAT_TEMPLATE_MISSING',
    hint: /chat_template/,
  });

  writeFileSync(
    join(at, 'special_tokens_map.json'),
    JSON.stringify({ bos_token: { content: '<s>' }, eos_token: '</s>' }),
  );
  const templates = [
    { name: 'default', template: 'A{{ bos_token }}' },
    { name: 'tool_use', template: 'T' },
  ];
  const extra = { 961: { content: '<extra>', special: true } };
  const config = { bos_token: '<unk>', chat_template: templates, added_tokens_decoder: extra };
  writeFileSync(join(at, 'tokenizer_config.json'), `\ufeff${JSON.stringify(config)}`);
  const mapped = await Tokenizer.load(at);
  t.match(mapped, { bosTokenId: 0, eosTokenId: 2 }, 'the configuration first, then the map');
  t.equal(mapped.chatTemplate().render([], { tokens: mapped.templateTokens }), 'A<unk>');
  t.equal(mapped.chatTemplate('tool_use').render([]), 'T');
  t.throws(() => mapped.chatTemplate('rag'), { code: 'ERR_QLORA_CHAT_TEMPLATE_MISSING', message: /default, tool_use/ });
  t.same(mapped.encode('<extra>', { parseSpecialTokens: true }), [961], 'a token that only the configuration lists');
  t.equal(mapped.vocabSize, 962);
  writeFileSync(join(at, 'chat_template.jinja'), 'J');
  t.equal((await Tokenizer.load(at)).chatTemplate().render([]), 'J', 'the file wins');
});
