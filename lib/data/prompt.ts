import type { Tokenizer } from '../tokenizer/tokenizer.js';
import { withBos } from './encode.js';
import { renderChat } from './encode-messages.js';
import type { Message } from './rows.js';
import { asksInChat, promptTemplate, questionOf } from './templates.js';

/** What can be continued: a text as it is, a conversation, an instruction. */
export type Prompt = string | readonly Message[] | { instruction: string; input?: string };

/** The templates that instructions and conversations go through; left out, those that rows go through. */
export interface PromptTemplates {
  template?: string;
  chatTemplate?: string;
}

/**
 * Ids of a prompt, made as those of a row are: one BOS where the tokenizer has one; messages through the chat template
 * with its generation prompt; an instruction through the named template.
 */
export function encodePrompt(prompt: Prompt, tokenizer: Tokenizer, templates: PromptTemplates = {}): number[] {
  const chat = (messages: readonly Message[], template: string | undefined): number[] =>
    renderChat({ messages }, tokenizer, template, { addGenerationPrompt: true }).ids;
  if (isMessages(prompt)) return chat(prompt, templates.chatTemplate);
  if (typeof prompt === 'string') return withBos(tokenizer.encode(prompt, { parseSpecialTokens: true }), tokenizer).ids;
  if (asksInChat(templates.template)) {
    return chat([{ role: 'user', content: questionOf(prompt) }], templates.template);
  }
  const { source, tail } = promptTemplate(templates.template);
  return withBos(tokenizer.encode(source(prompt) + tail, { parseSpecialTokens: true }), tokenizer).ids;
}

function isMessages(prompt: Prompt): prompt is readonly Message[] {
  return Array.isArray(prompt);
}
