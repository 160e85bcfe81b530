/** The chat template of a merged model writes what the adapter was trained with. */
import { join } from 'node:path';
import t from 'tap';
import { chatFormats } from '../../lib/data/chat-formats.js';
import { exportedChatTemplate } from '../../lib/data/exported-template.js';
import { namedChat } from '../../lib/data/named-chat.js';
import { ChatTemplate, type ChatTurn } from '../../lib/tokenizer/chat-template.js';
import { Tokenizer } from '../../lib/tokenizer/tokenizer.js';
import { referencesDir } from '../support/references.js';

const turn = (role: ChatTurn['role'], content: string): ChatTurn => ({ role, content });
const conversations = [
  [turn('user', ' "Q" {{ x }} {content} \\n\n ')],
  [turn('system', 'S{eos}'), turn('user', 'Q')],
  [turn('user', 'Q1'), turn('assistant', ' A1\t'), turn('user', "Q'2"), turn('assistant', 'A2')],
  [turn('system', 'S'), turn('user', 'Q1'), turn('assistant', 'A1'), turn('user', 'Q2')],
];

for (const kind of ['llama3-like', 'llama2-like', 'gpt2-like']) {
  t.test(kind, async (t) => {
    const tokenizer = await Tokenizer.load(join(referencesDir('tokenizers'), kind));
    const tokens = tokenizer.templateTokens;
    for (const [name, format] of Object.entries(chatFormats)) {
      const jinja = exportedChatTemplate({ template: name, chatTemplate: name }, tokenizer);
      t.type(jinja, 'string', name);
      const exported = await ChatTemplate.create(jinja as string);
      const own = namedChat(format, tokenizer);
      for (const messages of conversations) {
        for (const addGenerationPrompt of [false, true]) {
          const options = { tokens, addGenerationPrompt };
          t.equal(exported.render(messages, options), own.render(messages, options), name);
        }
      }
    }
    t.equal(exportedChatTemplate(undefined, tokenizer), undefined);
    t.equal(exportedChatTemplate({ template: 'chat' }, tokenizer), undefined, "the tokenizer's own stays");
  });
}
