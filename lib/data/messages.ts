/** Conversations as data sets write them: OpenAI's messages and ShareGPT's conversations, with calls of tools. */
import type { ToolCall } from '../tokenizer/chat-template.js';
import { type Fields, invalid, kindOf, optionalText, type RowPlace } from './row-fields.js';

export type Role = 'system' | 'user' | 'assistant' | 'tool';

export interface Message {
  role: Role;
  content: string;
  /** What an assistant's message calls. Written in OpenAI's names, as data sets and chat templates do. */
  tool_calls?: readonly ToolCall[];
  tool_call_id?: string;
  name?: string;
  /** OpenAI's: an assistant's message of weight 0 is not trained. */
  weight?: number;
}

interface Keys {
  role: string;
  content: string;
  roles: Readonly<Record<string, Role>>;
}

const roles: Readonly<Record<string, Role>> = {
  system: 'system',
  user: 'user',
  assistant: 'assistant',
  tool: 'tool',
};
export const openaiKeys: Keys = {
  role: 'role',
  content: 'content',
  roles: { ...roles, developer: 'system', function: 'tool' },
};
export const sharegptKeys: Keys = {
  role: 'from',
  content: 'value',
  roles: { ...roles, human: 'user', gpt: 'assistant', function_call: 'assistant', observation: 'tool' },
};

/** What calls and declarations of tools hold is walked by recursion. */
const mostDepth = 32;

/** The messages of a row, that of its own field `system` first. */
export function messagesOf(fields: Fields, name: string, given: Keys, place: RowPlace): Message[] {
  const list = parsed(fields[name]);
  if (!Array.isArray(list) || list.length === 0) {
    throw invalid(place, `${name} must be a list that is not empty, it is ${kindOf(list)}`, fields, [name]);
  }
  const messages = list.map((entry: unknown, i) => {
    const message = (typeof entry === 'object' && entry !== null ? entry : {}) as Fields;
    // Many call a file ShareGPT's whose messages have OpenAI's fields.
    const keys = given.role in message ? given : 'role' in message ? openaiKeys : given;
    return oneMessage(message, `${name}[${i}]`, keys, place);
  });
  const system = optionalText(fields, 'system', place);
  if (system && messages[0]?.role !== 'system') messages.unshift({ role: 'system', content: system });
  return messages;
}

function oneMessage(message: Fields, where: string, keys: Keys, place: RowPlace): Message {
  const expected = [keys.role, keys.content];
  const given = message[keys.role];
  const role = typeof given === 'string' && Object.hasOwn(keys.roles, given) ? keys.roles[given] : undefined;
  if (role === undefined) {
    const found = typeof given === 'string' ? `'${given.slice(0, 80)}'` : kindOf(given);
    const known = Object.keys(keys.roles).join(', ');
    throw invalid(place, `${where}.${keys.role} must be one of ${known}, it is ${found}`, message, expected);
  }
  const calls = callsOf(message, where, place);
  const content = contentOf(message[keys.content]);
  // A message that calls tools may say nothing.
  if (content === undefined || (content === null && calls === undefined)) {
    const what = `${where}.${keys.content} must be a string, it is ${kindOf(message[keys.content])}`;
    throw invalid(place, what, message, expected);
  }
  if (given === 'function_call') return functionCall(content ?? '', where, place);
  const weight = message.weight;
  return {
    role,
    content: content ?? '',
    ...(calls && role === 'assistant' && { tool_calls: calls }),
    ...(typeof message.tool_call_id === 'string' && { tool_call_id: message.tool_call_id }),
    ...(typeof message.name === 'string' && role === 'tool' && { name: message.name }),
    ...(typeof weight === 'number' && { weight }),
  };
}

/** A string; the text of a list of parts; null where there is none; undefined for anything else. */
function contentOf(content: unknown): string | null | undefined {
  if (content === null || content === undefined) return null;
  if (typeof content === 'string') return content;
  if (!Array.isArray(content)) return undefined;
  const texts = content.map((part: unknown) => {
    const { type, text } = (typeof part === 'object' && part !== null ? part : {}) as Fields;
    return type === 'text' && typeof text === 'string' ? text : undefined;
  });
  return texts.includes(undefined) ? undefined : texts.join('');
}

function callsOf(message: Fields, where: string, place: RowPlace): ToolCall[] | undefined {
  const { tool_calls, function_call } = message;
  const list = parsed(tool_calls) ?? (function_call == null ? undefined : [{ function: parsed(function_call) }]);
  if (list == null || (Array.isArray(list) && list.length === 0)) return undefined;
  if (!Array.isArray(list)) throw invalid(place, `${where}.tool_calls must be a list, it is ${kindOf(list)}`, message);
  return list.map((call: unknown, i) => oneCall(call, `${where}.tool_calls[${i}]`, place));
}

function oneCall(given: unknown, where: string, place: RowPlace): ToolCall {
  const call = (typeof given === 'object' && given !== null ? given : {}) as Fields;
  const called = (typeof call.function === 'object' && call.function !== null ? call.function : call) as Fields;
  const { name } = called;
  if (typeof name !== 'string') throw invalid(place, `${where} must have the name of a function`, call, ['function']);
  const args = parsed(called.arguments) ?? {};
  checkDepth(args, where, place);
  return {
    type: 'function',
    ...(typeof call.id === 'string' && { id: call.id }),
    function: { name, arguments: args },
  };
}

/** ShareGPT's: the call, or a list of calls, as JSON in the text. Text that is none is what the assistant said. */
function functionCall(content: string, where: string, place: RowPlace): Message {
  const value = parsed(content);
  if (typeof value !== 'object' || value === null) return { role: 'assistant', content };
  const calls = [value].flat().map((call, i) => oneCall(call, `${where}.value[${i}]`, place));
  return { role: 'assistant', content: '', tool_calls: calls };
}

/** Declarations of tools: a list, or one as JSON in a text. */
export function toolsOf(fields: Fields, place: RowPlace): { tools?: readonly unknown[] } {
  const tools = parsed(fields.tools);
  if (tools == null || tools === '' || (Array.isArray(tools) && tools.length === 0)) return {};
  if (!Array.isArray(tools)) {
    throw invalid(place, `tools must be a list, or one as JSON in a string, it is ${kindOf(tools)}`, fields, ['tools']);
  }
  checkDepth(tools, 'tools', place);
  return { tools };
}

/** What a string holds as JSON; a string that holds none, and any other value, as it is. */
function parsed(value: unknown): unknown {
  if (typeof value !== 'string' || !/^\s*[[{]/.test(value)) return value;
  try {
    return JSON.parse(value);
  } catch {
    return value;
  }
}

function checkDepth(value: unknown, where: string, place: RowPlace, depth = 0): void {
  if (typeof value !== 'object' || value === null) return;
  if (depth > mostDepth) throw invalid(place, `${where} nests deeper than ${mostDepth}`);
  for (const inner of Object.values(value)) checkDepth(inner, where, place, depth + 1);
}
