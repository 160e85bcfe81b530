/** The names that the option `template` takes, and what each does with an instruction and with a conversation. */
import { didYouMean, QLoRAError } from '../errors.js';
import type { TrainingRecord } from '../io/training-record.js';
import type { ChatRenderer } from '../tokenizer/chat-template.js';
import type { Tokenizer } from '../tokenizer/tokenizer.js';
import { type ChatFormat, chatFormats, task } from './chat-formats.js';
import { endTokensOf, namedChat } from './named-chat.js';

/** What an instruction row asks. */
export interface Instruction {
  instruction: string;
  input?: string;
}

/**
 * A way to write an instruction as a prompt. The prompt is `source(row) + tail`; a prompt that is too long loses
 * tokens of `source`, never of `tail`, which tells the model that the answer begins.
 */
export interface PromptTemplate {
  readonly source: (row: Instruction) => string;
  readonly tail: string;
}

const taskWithInput =
  'Below is an instruction that describes a task, paired with an input that provides further context. ' +
  'Write a response that appropriately completes the request.\n\n';

const alpacaSource = ({ instruction, input }: Instruction): string =>
  input
    ? `${taskWithInput}### Instruction:\n${instruction}\n\n### Input:\n${input}`
    : `${task}### Instruction:\n${instruction}`;

/** "Alpaca" is three strings; QLoRA's, with a space at its end, is the default. */
const promptTemplates: Readonly<Record<string, PromptTemplate>> = {
  alpaca: { source: alpacaSource, tail: '\n\n### Response: ' },
  'alpaca-lit-gpt': { source: alpacaSource, tail: '\n\n### Response:' },
  'alpaca-llama-factory': {
    source: ({ instruction, input }) => `${task}### Instruction:\n${instruction}${input ? `\n${input}` : ''}`,
    tail: '\n\n### Response:\n',
  },
};

/** What a prompt of one of these asks, without the words around it; the text itself where it is none. */
export function questionIn(prompt: string): string {
  const begin = [taskWithInput, task].find((words) => prompt.startsWith(words)) ?? '';
  const asked = /^### Instruction:\n(.*?)(?:\n\n### Input:\n(.*))?\n\n### Response:\s*$/s.exec(
    prompt.slice(begin.length),
  );
  return asked ? questionOf({ instruction: asked[1] as string, input: asked[2] }) : prompt;
}

const DEFAULT_TEMPLATE = 'alpaca';
/** The name of the model's own chat template. */
const ownTemplate = 'chat';

export function templateNames(): string[] {
  return [...Object.keys(chatFormats), ownTemplate];
}

/** Throws ERR_QLORA_TEMPLATE_UNKNOWN, which names the nearest. */
export function checkTemplate(name: string | undefined): void {
  if (name !== undefined && !templateNames().includes(name)) throw unknown(name, templateNames());
}

function unknown(name: string, known: readonly string[]): QLoRAError {
  const near = didYouMean(name, known);
  return new QLoRAError('ERR_QLORA_TEMPLATE_UNKNOWN', `There is no template '${name}', only ${known.join(', ')}`, {
    hint: near === undefined ? `The default is '${DEFAULT_TEMPLATE}'.` : `Did you mean '${near}'?`,
    detail: { template: name, known },
  });
}

/** Whether an instruction becomes a conversation of one question, rather than a prompt of its own. */
export function asksInChat(name: string = DEFAULT_TEMPLATE): boolean {
  checkTemplate(name);
  return !Object.hasOwn(promptTemplates, name);
}

/** How an instruction becomes a prompt, for the names that say so. Throws ERR_QLORA_TEMPLATE_UNKNOWN. */
export function promptTemplate(name: string = DEFAULT_TEMPLATE): PromptTemplate {
  const template = Object.hasOwn(promptTemplates, name) ? promptTemplates[name] : undefined;
  if (template) return template;
  throw unknown(name, Object.keys(promptTemplates));
}

function formatOf(name: string): ChatFormat | undefined {
  return Object.hasOwn(chatFormats, name) ? chatFormats[name as keyof typeof chatFormats] : undefined;
}

/** How a conversation becomes a text. Without a name, and with 'chat', the model's own chat template does it. */
export function chatRenderer(name: string | undefined, tokenizer: Tokenizer, tools?: readonly unknown[]): ChatRenderer {
  checkTemplate(name);
  const format = name === undefined ? undefined : formatOf(name);
  if (format) return namedChat(format, tokenizer);
  return tokenizer.chatTemplate(tools && tokenizer.chatTemplates.has('tool_use') ? 'tool_use' : 'default');
}

/** An instruction as a conversation's question: the input follows on a line of its own. */
export function questionOf({ instruction, input }: { instruction: string; input?: string | undefined }): string {
  return input ? `${instruction}\n${input}` : instruction;
}

/** Tokens that end an answer that was trained with this template, beside those that end any text. */
export function templateEndTokens(name: string | undefined, tokenizer: Tokenizer): number[] {
  const format = name === undefined ? undefined : formatOf(name);
  return format ? endTokensOf(format, tokenizer) : [];
}

/** What an adapter remembers of the option `template`. */
export function trainingRecord(name: string | undefined): TrainingRecord {
  return {
    template: name ?? DEFAULT_TEMPLATE,
    ...(name !== undefined && name !== ownTemplate && { chatTemplate: name }),
  };
}

/** The option that led to such a record. */
export function templateOf(record: TrainingRecord | undefined): string | undefined {
  if (record?.chatTemplate !== undefined) return record.chatTemplate;
  return record?.template === DEFAULT_TEMPLATE ? undefined : record?.template;
}
