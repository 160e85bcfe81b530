import type { ChatRenderer, ChatTurn, RenderOptions } from './chat-template.js';
import type { Range } from './splitter.js';
import type { Tokenizer, TokenPlace } from './tokenizer.js';

export interface ChatOptions {
  addGenerationPrompt?: boolean;
  /** Default: the tokenizer's own. */
  template?: ChatRenderer;
  /**
   * What becomes of special tokens that are written out in a message. 'parse' (default) is what transformers does:
   * they become tokens. 'text' keeps them text, so that a message cannot end its own turn.
   */
  specialTokens?: 'parse' | 'text';
  now?: Date;
  tools?: readonly unknown[];
}

/** An assistant's turn, in tokens: `ids.slice(start, end)` is what the model is to say. */
export interface TrainedTurn {
  start: number;
  end: number;
  /** Tokens right before `start` that open the turn, e.g. those of '<|im_end|>\n<|im_start|>assistant\n'. */
  opening: number;
  /** Last tokens of the turn, which close it, e.g. those of '<|im_end|>\n'. */
  closing: number;
}

export interface ChatEncoding {
  text: string;
  ids: number[];
  /**
   * The assistant's turns, in order; undefined for those that cannot be told apart since the template writes a
   * conversation's start otherwise once it goes on.
   */
  turns: (TrainedTurn | undefined)[];
  /** 1 for each token of an assistant's turn; undefined where a turn is, or with a generation prompt. */
  trained: Uint8Array | undefined;
}

/**
 * Renders a conversation and finds what the assistant says in it. A turn reaches from the end of the rendering of all
 * messages before it with the generation prompt to the end of the rendering that includes it, so the token that ends
 * the turn counts, and a newline that the template puts behind it.
 */
export function encodeChat(
  tokenizer: Tokenizer,
  messages: readonly ChatTurn[],
  options: ChatOptions = {},
): ChatEncoding {
  const { addGenerationPrompt = false, specialTokens = 'parse', now = new Date(), tools } = options;
  const template = options.template ?? tokenizer.chatTemplate();
  const guard = specialTokens === 'text' ? guardMessages(tokenizer, messages) : undefined;
  const turns = guard?.messages ?? messages;
  const how: RenderOptions = { tokens: tokenizer.templateTokens, now, tools };
  const render = (count: number, opened: boolean): Restored => {
    const text = template.render(turns.slice(0, count), { ...how, addGenerationPrompt: opened });
    return guard ? guard.restore(text) : { text, ranges: [] };
  };
  const { text, ranges } = render(turns.length, addGenerationPrompt);
  const encoding = { parseSpecialTokens: true, textRanges: ranges };
  const ids = tokenizer.encode(text, encoding);
  if (addGenerationPrompt) return { text, ids, turns: [], trained: undefined };

  const spans: (Span | undefined)[] = [];
  messages.forEach((message, i) => {
    if (message.role !== 'assistant') return;
    spans.push(
      spanOf(message.content, messages[i - 1]?.content ?? '', text, {
        before: () => render(i, false).text,
        opened: () => render(i, true).text,
        after: () => render(i + 1, false).text,
      }),
    );
  });
  const encoded = turnsOf(spans, (places) => tokenizer.tokensBefore(text, ids, places, encoding));
  const trained = encoded.includes(undefined) ? undefined : maskOf(tokenizer, ids, encoded);
  return { text, ids, turns: encoded, trained };
}

/** 1 for the tokens of `turns` that have a place in the text. */
export function maskOf(
  tokenizer: Pick<Tokenizer, 'hasPlace'>,
  ids: readonly number[],
  turns: readonly (TrainedTurn | undefined)[],
): Uint8Array {
  const mask = new Uint8Array(ids.length);
  for (const turn of turns) if (turn) mask.fill(1, turn.start, turn.end);
  return mask.map((bit, i) => (tokenizer.hasPlace(ids[i] as number) ? bit : 0));
}

interface Span extends Range {
  /** Where the text that opens the turn begins. */
  opening: number;
  /** Where the message's own text ends. */
  closing: number;
}

interface Renderings {
  before(): string;
  opened(): string;
  after(): string;
}

function spanOf(content: string, previous: string, text: string, render: Renderings): Span | undefined {
  const opened = render.opened();
  const after = render.after();
  if (!after.startsWith(opened) || !text.startsWith(after)) return undefined;
  const before = tryRender(render.before);
  // What opens the turn begins where the text of the message before it ends: with the token that ends that message.
  const asked = previous.trim();
  const inside = before !== undefined && opened.startsWith(before) ? before.length : opened.length;
  const askedAt = asked === '' ? -1 : opened.lastIndexOf(asked, inside - asked.length);
  const opening = askedAt < 0 ? inside : askedAt + asked.length;
  const said = content.trim();
  const at = after.indexOf(said, opened.length);
  const closing = at < 0 ? after.length : at + said.length;
  return { opening, start: opened.length, closing, end: after.length };
}

function turnsOf(
  spans: readonly (Span | undefined)[],
  placesOf: (places: number[]) => TokenPlace[],
): (TrainedTurn | undefined)[] {
  const found = placesOf(spans.flatMap((span) => (span ? [span.opening, span.start, span.closing, span.end] : [])));
  let next = 0;
  return spans.map((span) => {
    if (!span) return undefined;
    const [opening, first, closing, last] = found.slice(next, next + 4) as [
      TokenPlace,
      TokenPlace,
      TokenPlace,
      TokenPlace,
    ];
    next += 4;
    const start = first.touched;
    const end = Math.max(last.whole, start);
    return {
      start,
      end,
      opening: Math.max(0, start - opening.whole),
      closing: end - Math.min(Math.max(closing.whole, start), end),
    };
  });
}

/** Templates may refuse what comes before a turn when nothing opens it, as one does that demands a user's message last. */
function tryRender(render: () => string): string | undefined {
  try {
    return render();
  } catch {
    return undefined;
  }
}

interface Restored {
  text: string;
  ranges: Range[];
}

const MARK = '\ufdd0';
const END_MARK = '\ufdd1';

/** Messages with each special token in them replaced by a mark, and the way back, which tells where they stood. */
function guardMessages(
  tokenizer: Tokenizer,
  messages: readonly ChatTurn[],
): { messages: ChatTurn[]; restore(text: string): Restored } {
  const originals: string[] = [];
  const mark = (original: string): string => `${MARK}${originals.push(original) - 1}${END_MARK}`;
  const guardText = (text: string): string => {
    let out = '';
    let from = 0;
    for (const { start, end } of tokenizer.specialRanges(text)) {
      out += markMarks(text.slice(from, start), mark) + mark(text.slice(start, end));
      from = end;
    }
    return out + markMarks(text.slice(from), mark);
  };
  const guarded = messages.map((message) => mapStrings(message, guardText));
  const restore = (text: string): Restored => {
    const ranges: Range[] = [];
    let out = '';
    let from = 0;
    for (const match of text.matchAll(/\ufdd0(\d+)\ufdd1/g)) {
      out += text.slice(from, match.index);
      const original = originals[Number(match[1])] ?? '';
      ranges.push({ start: out.length, end: out.length + original.length });
      out += original;
      from = match.index + match[0].length;
    }
    return { text: out + text.slice(from), ranges };
  };
  return { messages: guarded, restore };
}

/** The same message with other text in all but its role and names. */
function mapStrings(message: ChatTurn, map: (text: string) => string): ChatTurn {
  const within = (value: unknown): unknown => {
    if (typeof value === 'string') return map(value);
    if (Array.isArray(value)) return value.map(within);
    if (typeof value !== 'object' || value === null) return value;
    return Object.fromEntries(Object.entries(value).map(([name, inner]) => [map(name), within(inner)]));
  };
  const calls = message.tool_calls?.map((call) => ({
    ...call,
    function: { name: map(call.function.name), arguments: within(call.function.arguments) },
  }));
  return { ...message, content: map(message.content), ...(calls && { tool_calls: calls }) };
}

function markMarks(text: string, mark: (original: string) => string): string {
  return text.includes(MARK) ? text.split(MARK).join(mark(MARK)) : text;
}
