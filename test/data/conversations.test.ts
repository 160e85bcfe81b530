/** Templates by name, conversations of every kind, calls of tools. */
import { join } from 'node:path';
import t from 'tap';
import { type EncodeOptions, encodeRow } from '../../lib/data/encode.js';
import { renderChat } from '../../lib/data/encode-messages.js';
import { explainRow } from '../../lib/data/explain.js';
import { encodePrompt } from '../../lib/data/prompt.js';
import { type Row, toRow } from '../../lib/data/rows.js';
import {
  chatRenderer,
  templateEndTokens,
  templateNames,
  templateOf,
  trainingRecord,
} from '../../lib/data/templates.js';
import { encodeChat } from '../../lib/tokenizer/chat.js';
import { ChatTemplate, type ChatTurn } from '../../lib/tokenizer/chat-template.js';
import { Tokenizer } from '../../lib/tokenizer/tokenizer.js';
import { readJson, referencesDir } from '../support/references.js';

t.setTimeout(600_000); // a busy machine is slow

const folder = referencesDir('tokenizers');
const load = (name: string): Promise<Tokenizer> => Tokenizer.load(join(folder, name));
interface ChatCase {
  template: string;
  tokenizer: string;
  conversation: string;
  addGenerationPrompt: boolean;
  text?: string;
  trained: number[] | null;
}
const references = readJson<{ conversations: Record<string, ChatTurn[]>; cases: ChatCase[] }>(folder, 'chat.json');

const talk = [
  { role: 'system', content: 'S' },
  { role: 'user', content: 'Q1' },
  { role: 'assistant', content: 'A1' },
  { role: 'user', content: 'Q2' },
  { role: 'assistant', content: 'A2' },
] as const;

/** The whole text of `talk`, with BOS and EOS as <s> and </s>, and what of it is trained. */
const expected: Record<string, [text: string, trained: string, asked: string]> = {
  chatml: [
    '<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1</s>\n' +
      '<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2</s>\n',
    'A1</s>\n|A2</s>\n',
    '<s><|im_start|>user\nI\nJ<|im_end|>\n<|im_start|>assistant\n',
  ],
  qwen: [
    '<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1</s>\n' +
      '<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2</s>\n',
    'A1</s>\n|A2</s>\n',
    '<s><|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' +
      '<|im_start|>user\nI\nJ<|im_end|>\n<|im_start|>assistant\n',
  ],
  llama2: [
    '<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST] A2 </s>',
    ' A1 </s>| A2 </s>',
    '<s>[INST] I\nJ [/INST]',
  ],
  mistral: ['<s>[INST] S\n\nQ1 [/INST] A1</s>[INST] Q2 [/INST] A2</s>', ' A1</s>| A2</s>', '<s>[INST] I\nJ [/INST]'],
  llama3: [
    '<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>' +
      '<|start_header_id|>assistant<|end_header_id|>\n\nA1</s><|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>' +
      '<|start_header_id|>assistant<|end_header_id|>\n\nA2</s>',
    'A1</s>|A2</s>',
    '<s><|start_header_id|>user<|end_header_id|>\n\nI\nJ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n',
  ],
  zephyr: [
    '<s><|system|>\nS</s>\n<|user|>\nQ1</s>\n<|assistant|>\nA1</s>\n<|user|>\nQ2</s>\n<|assistant|>\nA2</s>\n',
    'A1</s>\n|A2</s>\n',
    '<s><|user|>\nI\nJ</s>\n<|assistant|>\n',
  ],
  gemma: [
    '<s><start_of_turn>user\nS\n\nQ1<end_of_turn>\n<start_of_turn>model\nA1</s>\n<start_of_turn>user\nQ2<end_of_turn>\n' +
      '<start_of_turn>model\nA2</s>\n',
    'A1</s>\n|A2</s>\n',
    '<s><start_of_turn>user\nI\nJ<end_of_turn>\n<start_of_turn>model\n',
  ],
  'deepseek-coder': [
    '<s>S### Instruction:\nQ1\n### Response:\nA1\n</s>\n### Instruction:\nQ2\n### Response:\nA2\n</s>\n',
    'A1\n</s>\n|A2\n</s>\n',
    '<s>You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you ' +
      'only answer questions related to computer science. For politically sensitive questions, security and privacy ' +
      'issues, and other non-computer science questions, you will refuse to answer\n' +
      '### Instruction:\nI\nJ\n### Response:\n',
  ],
  vicuna: [
    '<s>S USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>',
    ' A1</s>| A2</s>',
    "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions. USER: I\nJ ASSISTANT:",
  ],
  plain: ['<s>S\nQ1\nA1</s>\nQ2\nA2</s>\n', 'A1</s>\n|A2</s>\n', '<s>I\nJ\n'],
  alpaca: [
    '<s>S### Instruction:\nQ1\n\n### Response: A1</s>\n\n### Instruction:\nQ2\n\n### Response: A2</s>\n\n',
    'A1</s>\n\n|A2</s>\n\n',
    '',
  ],
};

/** Runs of trained tokens, as text. */
function trainedText(row: Row, tokenizer: Tokenizer, options: EncodeOptions): string {
  const { tokens, trained } = explainRow(row, tokenizer, options);
  return tokens
    .map((token, i) => (trained[i] ? `${i > 0 && !trained[i - 1] ? '|' : ''}${token}` : ''))
    .join('')
    .slice(1);
}

t.test('each template writes what its models know', async (t) => {
  const llama = await load('llama2-like');
  for (const [template, [text, trained, asked]] of Object.entries(expected)) {
    const row = toRow({ messages: talk }, { row: 1 });
    const { ids, labels } = encodeRow(row, llama, { template });
    // This tokenizer puts a space before a text, and behind each of its special tokens.
    const same = (s: string) => s.replace(/ /g, '');
    const explained = explainRow(row, llama, { template });
    t.equal(same(explained.tokens.join('')), same(text), template);
    t.equal(same(trainedText(row, llama, { template })), same(trained), `${template}: what is trained`);
    t.equal(ids[0], 1);
    t.equal(ids.filter((id) => id === 1).length, template === 'llama2' ? 2 : 1, `${template}: BOS`);
    t.ok(labels.includes(2), `${template}: the end is trained`);
    const last = trainedText(row, llama, { template, maskHistory: true });
    t.equal(same(last), same(trained.split('|')[1] as string), `${template}: the last turn`);
    if (asked === '') continue;
    const question = { instruction: 'I', input: 'J', output: 'A' };
    const prompt = encodePrompt(question, llama, { template });
    t.equal(same(explainRow({ inputIds: prompt }, llama).tokens.join('')), same(asked), `${template}: a question`);
    const answered = encodeRow(question, llama, { template });
    t.same([...answered.ids].slice(0, prompt.length), prompt, `${template}: asked as it was trained`);
    t.same(
      [...answered.labels].findIndex((l) => l !== -100),
      prompt.length,
      `${template}: the prompt is not trained`,
    );
  }
  const tested = [...Object.keys(expected), 'alpaca-lit-gpt', 'alpaca-llama-factory', 'chat'];
  t.same(templateNames().sort(), tested.sort());
});

t.test('they agree with the templates that models bring', async (t) => {
  let compared = 0;
  for (const c of references.cases) {
    if (typeof c.text !== 'string' || !(c.template in expected) || c.conversation === 'wrong-order') continue;
    const tokenizer = await load(c.tokenizer);
    const template = chatRenderer(c.template, tokenizer);
    const { addGenerationPrompt } = c;
    const { text, trained } = encodeChat(tokenizer, references.conversations[c.conversation] as ChatTurn[], {
      template,
      addGenerationPrompt,
    });
    const label = `${c.template} ${c.conversation}`;
    const bos = tokenizer.templateTokens.bos_token ?? '';
    const more = text.length - c.text.length;
    t.equal(text.slice(c.text.startsWith(bos) ? 0 : bos.length), c.text, label);
    if (c.trained !== null && !addGenerationPrompt && more === 0) t.same([...(trained ?? [])], c.trained, label);
    compared++;
  }
  t.ok(compared > 40, `${compared} were compared`);
});

t.test('what ends an answer', async (t) => {
  const [gpt2, llama2, llama3, gemma] = await Promise.all(
    ['gpt2-like', 'llama2-like', 'llama3-like', 'gemma-like'].map(load),
  );
  const ends = (tokenizer: Tokenizer | undefined, template: string) => {
    const row = explainRow({ instruction: 'q', output: 'a' }, tokenizer, { template });
    return row.tokens.filter((token, i) => row.trained[i] && token.trim() !== '').at(-1);
  };
  t.equal(ends(gpt2, 'chatml'), '<|im_end|>');
  t.equal(ends(llama3, 'llama3'), '<|eot_id|>');
  t.equal(ends(gemma, 'gemma'), '<end_of_turn>');
  t.equal(ends(llama2, 'chatml'), '</s>', 'EOS, where the tokenizer lacks the token');
  t.same(templateEndTokens('gemma', gemma as Tokenizer), [gemma?.idOf('<end_of_turn>')]);
  t.same(templateEndTokens('chatml', llama2 as Tokenizer), []);
  t.same(templateEndTokens('alpaca', gemma as Tokenizer), []);
  t.same(templateEndTokens('toString', gemma as Tokenizer), []);

  for (const name of [undefined, 'alpaca', 'alpaca-lit-gpt', 'chat', 'chatml']) {
    t.equal(templateOf(trainingRecord(name)), name, `an adapter remembers ${name}`);
  }
  t.same(trainingRecord(undefined), { template: 'alpaca' });
  t.same(trainingRecord('chat'), { template: 'chat' });
  const placeholder = { instruction: '{eos}{content}$&', output: '{end}$1' };
  const text = explainRow(placeholder, gpt2, { template: 'chatml' }).tokens.join('');
  t.equal(text, '<|im_start|>user\n{eos}{content}$&<|im_end|>\n<|im_start|>assistant\n{end}$1<|im_end|>\n');
  const t5 = await load('t5-like');
  t.throws(() => encodeRow(placeholder, t5, { template: 'chat' }), { code: 'ERR_QLORA_CHAT_TEMPLATE_MISSING' });
  const own = explainRow({ instruction: 'q', input: 'i', output: 'a' }, gpt2, { template: 'chat' });
  const direct = {
    messages: [
      { role: 'user', content: 'q\ni' },
      { role: 'assistant', content: 'a' },
    ],
  } as Row;
  t.same(own.ids, explainRow(direct, gpt2).ids, "an instruction through the model's own template");
});

t.test('a question that is too long keeps what opens and what ends its answer', async (t) => {
  const gpt2 = await load('gpt2-like');
  const words = 'the house is near the water and the city '.repeat(20);
  for (const [sourceMaxLength, targetMaxLength] of [
    [20, 10],
    [40, 256],
    [1024, 6],
  ] as const) {
    const limits = { template: 'chatml', sourceMaxLength, targetMaxLength };
    const { ids, labels, cut } = encodeRow({ instruction: words, output: words }, gpt2, limits);
    const start = labels.findIndex((label) => label !== -100);
    t.ok(start <= sourceMaxLength && ids.length - start <= targetMaxLength);
    t.match(gpt2.decode(ids.slice(0, start)), /<\|im_end\|>\n<\|im_start\|>assistant\n$/);
    t.match(gpt2.decode(ids.slice(start)), /<\|im_end\|>\n$/);
    const whole = encodeRow({ instruction: words, output: words }, gpt2, { template: 'chatml', maxLength: 10_000 });
    t.equal(cut.source + cut.target, whole.ids.length - ids.length);
  }
});

const call = { name: 'f', arguments: { x: 1, y: 'z' } };
const openai = {
  tools: [{ type: 'function', function: { name: 'f' } }],
  messages: [
    { role: 'developer', content: 'S' },
    {
      role: 'user',
      content: [
        { type: 'text', text: 'Q' },
        { type: 'text', text: '!' },
      ],
    },
    {
      role: 'assistant',
      content: null,
      tool_calls: [{ id: 'c1', type: 'function', function: { name: 'f', arguments: '{"x":1,"y":"z"}' } }],
    },
    { role: 'tool', tool_call_id: 'c1', name: 'f', content: 'R' },
    { role: 'assistant', content: 'A' },
  ],
};
const sharegpt = {
  system: 'S',
  tools: '[{"type":"function","function":{"name":"f"}}]',
  conversations: [
    { from: 'human', value: 'Q!' },
    { from: 'function_call', value: JSON.stringify(call) },
    { from: 'observation', value: 'R' },
    { from: 'gpt', value: 'A' },
  ],
};

t.test('calls of tools are trained, their results are not', async (t) => {
  const gpt2 = await load('gpt2-like');
  const at = { row: 1 };
  const toolCalls = [{ type: 'function', function: call }];
  const a = toRow(openai, at);
  t.match(a, {
    messages: [
      { role: 'system', content: 'S' },
      { role: 'user', content: 'Q!' },
      { role: 'assistant', content: '', tool_calls: toolCalls },
      { role: 'tool', content: 'R', tool_call_id: 'c1', name: 'f' },
      { role: 'assistant', content: 'A' },
    ],
    tools: openai.tools,
  });
  const b = toRow(sharegpt, at);
  for (const row of [a, b]) {
    const { tokens } = explainRow(row, gpt2, { template: 'chatml' });
    const text = tokens.join('');
    t.match(text, /^<\|im_start\|>system\nS\n\n# Tools\n/);
    t.match(text, '<tools>\n{"type": "function", "function": {"name": "f"}}\n</tools>');
    t.match(text, '<|im_start|>user\n<tool_response>\nR\n</tool_response><|im_end|>\n');
    t.equal(
      trainedText(row, gpt2, { template: 'chatml' }),
      '<tool_call>\n{"name": "f", "arguments": {"x": 1, "y": "z"}}\n</tool_call><|im_end|>\n|A<|im_end|>\n',
    );
  }
  t.same(explainRow(a, gpt2), explainRow(b, gpt2), "the model's own template knows no tools: the same text");

  const knowing = await ChatTemplate.create(
    '{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{% for c in m.tool_calls %}CALL {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if tools %}{{ tools | length }} tools{% endif %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}',
  );
  const own = await load('gpt2-like');
  (own.chatTemplates as Map<string, ChatTemplate>).set('default', knowing);
  const given = a as Extract<Row, { messages: unknown }>;
  const { text } = renderChat(given, own, undefined);
  t.match(text, '<|im_start|>assistant\nCALL f {"x": 1, "y": "z"}<|im_end|>\n<|im_start|>tool\nR<|im_end|>');
  t.match(text, /1 tools$/);
  const evil = structuredClone(given);
  (evil.messages[2] as { tool_calls: unknown }).tool_calls = [
    { type: 'function', function: { name: 'f', arguments: { x: '<|im_end|>' } } },
  ];
  const count = (specialTokens: 'parse' | 'text') =>
    renderChat(evil, own, undefined, { specialTokens }).ids.filter((id) => id === own.idOf('<|im_end|>')).length;
  t.equal(count('parse') - count('text'), 1, 'a special token in an argument stays text where asked');

  const weighted = structuredClone(openai) as { messages: { weight?: number }[] };
  (weighted.messages[2] as { weight?: number }).weight = 0;
  t.equal(trainedText(toRow(weighted, at), gpt2, { template: 'chatml' }), 'A<|im_end|>\n', 'weight 0 is not trained');

  let deep: unknown = 1;
  for (let i = 0; i < 5000; i++) deep = [deep];
  const wrong: [object, RegExp][] = [
    [{ messages: [{ role: 'user', content: [{ type: 'image_url' }] }] }, /content must be a string, it is a list/],
    [{ messages: [{ role: 'assistant', content: null }] }, /content must be a string, it is null/],
    [{ messages: [{ role: 'assistant', tool_calls: [{ function: {} }] }] }, /tool_calls\[0\] must have the name/],
    [{ messages: [{ role: 'assistant', tool_calls: 7 }] }, /tool_calls must be a list, it is a number/],
    [
      { messages: [{ role: 'assistant', tool_calls: [{ function: { name: 'f', arguments: deep } }] }] },
      /deeper than 32/,
    ],
    [{ messages: talk, tools: [deep] }, /tools nests deeper than 32/],
    [{ messages: talk, tools: 'no list' }, /tools must be a list/],
    [{ messages: talk, system: 7 }, /system must be a string/],
    [{ conversations: 'text' }, /conversations must be a list/],
  ];
  for (const [record, message] of wrong) {
    t.throws(() => toRow(record, at), { code: 'ERR_QLORA_ROW_INVALID', message }, String(message));
  }
  const said = toRow({ conversations: [{ from: 'function_call', value: 'no JSON' }] }, at);
  t.match(said, { messages: [{ role: 'assistant', content: 'no JSON' }] });
  const text2 = toRow({ messages: JSON.stringify(talk) }, at);
  t.match(text2, { messages: talk }, 'a list as JSON in a column of a table');
});

t.test('a row is the same tokens on every day', async (t) => {
  const gpt2 = await load('gpt2-like');
  const dated = await ChatTemplate.create(
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
  );
  (gpt2.chatTemplates as Map<string, ChatTemplate>).set('default', dated);
  const { tokens } = explainRow(toRow({ messages: talk }, { row: 1 }), gpt2);
  t.match(tokens.join(''), /^26 Jul 2024/);
});
