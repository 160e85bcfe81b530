/** Renders conversations in the forms of chat-formats.ts. */
import type { ChatRenderer, ChatTurn, RenderOptions } from '../tokenizer/chat-template.js';
import type { Tokenizer } from '../tokenizer/tokenizer.js';
import type { ChatFormat } from './chat-formats.js';

/** The text that ends an answer in this form, as this tokenizer can write it with one token. */
export function endOf({ end }: ChatFormat, tokenizer: Pick<Tokenizer, 'idOf' | 'templateTokens'>): string {
  const eos = tokenizer.templateTokens.eos_token;
  return end !== undefined && (eos === undefined || tokenizer.idOf(end) !== undefined) ? end : (eos ?? '');
}

/** Ids that end an answer in this form, beside those that end any text. */
export function endTokensOf(format: ChatFormat, tokenizer: Tokenizer): number[] {
  const id = format.end === undefined ? undefined : tokenizer.idOf(format.end);
  return id === undefined ? [] : [id];
}

export function namedChat(format: ChatFormat, tokenizer: Pick<Tokenizer, 'idOf' | 'templateTokens'>): ChatRenderer {
  const end = endOf(format, tokenizer);
  return { render: (messages, options = {}) => render(format, end, messages, options) };
}

function render(format: ChatFormat, end: string, messages: readonly ChatTurn[], options: RenderOptions): string {
  const { tokens = {}, addGenerationPrompt = false } = options;
  const { bos_token: bos = '', eos_token: eos = '' } = tokens;
  const fill = (pattern: string, { role, content }: ChatTurn, before = ''): string => {
    const said = format.trimmed?.includes(role) ? content.trim() : content;
    // One pass, so that a placeholder that a message spells out stays text.
    return pattern.replace(/\{(content|bos|eos|end)\}/g, (_, name: string) =>
      name === 'content' ? before + said : name === 'bos' ? bos : name === 'eos' ? eos : end,
    );
  };
  const { defaultSystem } = format;
  const all: readonly ChatTurn[] =
    defaultSystem !== undefined && messages[0]?.role !== 'system'
      ? [{ role: 'system', content: defaultSystem }, ...messages]
      : messages;
  let text = '';
  let pending = '';
  for (const message of all) {
    if (message.role === 'system') {
      if ('message' in format.system) text += fill(format.system.message, message);
      else pending += fill(format.system.inUser, message);
    } else if (message.role === 'assistant') {
      text += format.opening + fill(format.answer, message);
    } else {
      text += fill(format.user, message, pending);
      pending = '';
    }
  }
  if (addGenerationPrompt) text += format.opening;
  return text.startsWith(bos) ? text : bos + text;
}
