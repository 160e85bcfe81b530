/** Ids and labels of conversations. */
import { QLoRAError } from '../errors.js';
import { type ChatEncoding, encodeChat, maskOf, type TrainedTurn } from '../tokenizer/chat.js';
import { ChatTemplate } from '../tokenizer/chat-template.js';
import type { Tokenizer } from '../tokenizer/tokenizer.js';
import { type EncodedRow, type EncodeOptions, IGNORED, join } from './encoded-row.js';
import type { Limits, Source, Target } from './fit.js';
import type { Message } from './messages.js';
import { describePlace, type RowPlace } from './row-fields.js';
import { chatRenderer, type Instruction, questionOf } from './templates.js';
import { withToolsAsText } from './tools.js';

export interface Conversation {
  messages: readonly Message[];
  tools?: readonly unknown[];
}

/**
 * What templates that write the date take for today: Llama 3.1's own date. A row then becomes the same tokens on every
 * day, and a resumed run trains on what it trained on before.
 */
const trainingDate = new Date(2024, 6, 26);

/** A conversation through the named template, or the model's own; calls of tools as text where that knows none. */
export function renderChat(
  { messages, tools }: Conversation,
  tokenizer: Tokenizer,
  template: string | undefined,
  options: { addGenerationPrompt?: boolean; specialTokens?: 'parse' | 'text'; now?: Date } = {},
): ChatEncoding {
  const renderer = chatRenderer(template, tokenizer, tools);
  const uses = tools !== undefined || messages.some(({ role, tool_calls }) => role === 'tool' || tool_calls);
  const knows = renderer instanceof ChatTemplate && renderer.source.includes('tool_calls');
  if (!uses || knows) return encodeChat(tokenizer, messages, { template: renderer, tools, ...options });
  return encodeChat(tokenizer, withToolsAsText(messages, tools), { template: renderer, ...options });
}

/** An instruction as a conversation of one question, cut as a source and a target are. */
export function encodeQuestion(
  row: Instruction & { output: string },
  tokenizer: Tokenizer,
  options: EncodeOptions,
  limits: Limits,
  place: RowPlace,
): EncodedRow {
  const messages: Message[] = [
    { role: 'user', content: questionOf(row) },
    { role: 'assistant', content: row.output },
  ];
  const { specialTokens = 'parse', trainOnSource = false, template } = options;
  const { ids, turns } = renderChat({ messages }, tokenizer, template, { specialTokens, now: trainingDate });
  const turn = wantedTurns(messages, turns, false, place)[0] as TrainedTurn;
  return joinTurn(ids, turn, tokenizer, limits, trainOnSource, place);
}

/** One turn and what comes before it, as a target and its source. */
function joinTurn(
  ids: readonly number[],
  turn: TrainedTurn,
  tokenizer: Tokenizer,
  limits: Limits,
  trainOnSource: boolean,
  place: RowPlace,
): EncodedRow {
  const source: Source = { ids: ids.slice(0, turn.start), head: startsWithBos(ids, tokenizer), tail: turn.opening };
  const target: Target = { ids: ids.slice(turn.start, turn.end), closing: turn.closing };
  const encoded = join(source, target, limits, trainOnSource, place);
  return { ...encoded, truncated: ids.length - encoded.ids.length };
}

/**
 * A conversation that is too long ends with the last assistant's turn that fits. Where not even the first does, that
 * turn and what comes before it are cut as a source and a target are: what opens and what closes the turn stay.
 */
export function encodeMessages(
  row: Conversation,
  tokenizer: Tokenizer,
  options: EncodeOptions,
  limits: Limits,
  place: RowPlace,
): EncodedRow {
  const { maskHistory = false, trainOnSource = false, specialTokens = 'parse', template } = options;
  const { ids, turns } = renderChat(row, tokenizer, template, { specialTokens, now: trainingDate });
  const wanted = trainOnSource
    ? turns.filter((turn) => turn !== undefined)
    : wantedTurns(row.messages, turns, maskHistory, place);
  const trained = wanted.filter((turn) => turn.end <= limits.total);
  const first = wanted[0];
  if (ids.length > limits.total && trained.length === 0 && first) {
    const { total } = limits;
    return joinTurn(ids, first, tokenizer, { source: total, target: total, total }, trainOnSource, place);
  }
  const end = ids.length > limits.total ? (trained.at(-1)?.end ?? limits.total) : ids.length;
  const kept = Int32Array.from(ids.slice(0, end));
  const labels = trainOnSource ? kept.slice() : new Int32Array(end).fill(IGNORED);
  const mask = maskOf(tokenizer, ids, trained);
  for (let t = 0; t < end; t++) if (mask[t]) labels[t] = kept[t] as number;
  return { ids: kept, labels, truncated: ids.length - end, cut: { source: 0, target: ids.length - end } };
}

function startsWithBos(ids: readonly number[], { bosTokenId }: Tokenizer): number {
  return bosTokenId !== undefined && ids[0] === bosTokenId ? 1 : 0;
}

/** The turns that are to be trained, all of which must have been found. */
function wantedTurns(
  messages: readonly Message[],
  turns: readonly (TrainedTurn | undefined)[],
  maskHistory: boolean,
  place: RowPlace,
): TrainedTurn[] {
  const said = messages.filter(({ role }) => role === 'assistant');
  const first = maskHistory ? said.length - 1 : 0;
  const wanted = turns.filter((_, i) => i >= first && said[i]?.weight !== 0);
  const exact = wanted.filter((turn) => turn !== undefined);
  if (exact.length === wanted.length) return exact;
  throw new QLoRAError(
    'ERR_QLORA_CHAT_TEMPLATE',
    `The chat template writes the earlier messages of ${describePlace(place)} otherwise once the conversation goes on, ` +
      "so it cannot be told which tokens are the assistant's",
    {
      hint: maskHistory
        ? 'Use another chat template, or rows of prompt and completion.'
        : 'Set maskHistory: true to train the last turn of each conversation only.',
      detail: { ...place },
    },
  );
}
