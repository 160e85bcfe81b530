/** Chat templates for models that go elsewhere: what chat-formats.ts describes, in Jinja. */
import type { TrainingRecord } from '../io/training-record.js';
import type { Tokenizer } from '../tokenizer/tokenizer.js';
import { type ChatFormat, chatFormats } from './chat-formats.js';
import { endOf } from './named-chat.js';

/**
 * The chat template (Jinja) of a model that an adapter was merged into: what the adapter was trained with. undefined where
 * the tokenizer's own serves: it was trained with that, or with instructions and the tokenizer has one for conversations.
 */
export function exportedChatTemplate(record: TrainingRecord | undefined, tokenizer: Tokenizer): string | undefined {
  if (!record || (record.chatTemplate === undefined && tokenizer.chatTemplates.size > 0)) return undefined;
  const name = record.chatTemplate ?? record.template;
  if (!Object.hasOwn(chatFormats, name)) return undefined;
  return jinjaOf(chatFormats[name as keyof typeof chatFormats], tokenizer);
}

function jinjaOf(format: ChatFormat, tokenizer: Tokenizer): string {
  // A token that the tokenizer lacks is no variable of the template either.
  const variable = (name: string) => (name in tokenizer.templateTokens ? name : '""');
  const values = {
    bos: variable('bos_token'),
    eos: variable('eos_token'),
    end: JSON.stringify(endOf(format, tokenizer)),
  };
  const filled = (pattern: string, content: string) =>
    pattern
      .split(/(\{(?:content|bos|eos|end)\})/)
      .filter((part) => part !== '')
      .map((part) => {
        const name = /^\{(\w+)\}$/.exec(part)?.[1];
        if (name === undefined) return JSON.stringify(part);
        return name === 'content' ? content : values[name as keyof typeof values];
      })
      .join(' ~ ');
  const said = (role: string) => `message['content']${format.trimmed?.includes(role) ? ' | trim' : ''}`;
  const { system, defaultSystem } = format;
  const begins = tokenizer.bosTokenId !== undefined && !format.user.startsWith('{bos}');
  const onSystem = (content: string) =>
    'message' in system
      ? `{{ ${filled(system.message, content)} }}`
      : `{% set ns.pending = ${filled(system.inUser, content)} %}`;
  return [
    begins ? '{{ bos_token }}' : '',
    "{% set ns = namespace(pending='') %}",
    defaultSystem === undefined
      ? ''
      : `{% if messages[0]['role'] != 'system' %}${onSystem(JSON.stringify(defaultSystem))}{% endif %}`,
    '{% for message in messages %}',
    `{% if message['role'] == 'system' %}${onSystem(`(${said('system')})`)}`,
    `{% elif message['role'] == 'assistant' %}{{ ${JSON.stringify(format.opening)} ~ ${filled(format.answer, `(${said('assistant')})`)} }}`,
    `{% else %}{{ ${filled(format.user, `ns.pending ~ (${said('user')})`)} }}{% set ns.pending = '' %}{% endif %}`,
    '{% endfor %}',
    `{% if add_generation_prompt %}{{ ${JSON.stringify(format.opening)} }}{% endif %}`,
  ].join('');
}
