import { encodeChat } from '../tokenizer/chat.js';
import type { Tokenizer } from '../tokenizer/tokenizer.js';
import { withBos } from './encode.js';
import type { Message } from './rows.js';
import { promptTemplate } from './templates.js';

/** What can be continued: a text as it is, a conversation, an instruction. */
export type Prompt = string | readonly Message[] | { instruction: string; input?: string };

/**
 * Ids of a prompt, made as those of a row are: one BOS where the tokenizer has one; messages through the chat template
 * with its generation prompt; an instruction through the named template.
 */
export function encodePrompt(prompt: Prompt, tokenizer: Tokenizer, template?: string): number[] {
  if (isMessages(prompt)) return encodeChat(tokenizer, prompt, { addGenerationPrompt: true }).ids;
  if (typeof prompt === 'string') return withBos(tokenizer.encode(prompt, { parseSpecialTokens: true }), tokenizer).ids;
  const { source, tail } = promptTemplate(template);
  return withBos(tokenizer.encode(source(prompt) + tail, { parseSpecialTokens: true }), tokenizer).ids;
}

function isMessages(prompt: Prompt): prompt is readonly Message[] {
  return Array.isArray(prompt);
}
