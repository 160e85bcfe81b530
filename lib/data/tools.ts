/** Calls of tools as text, for templates that know none: in the form that Hermes and Qwen models use. */
import type { ChatTurn } from '../tokenizer/chat-template.js';

/** The same conversation in messages of system, user and assistant alone; as many of the assistant, in the same order. */
export function withToolsAsText(messages: readonly ChatTurn[], tools: readonly unknown[] = []): ChatTurn[] {
  const out: ChatTurn[] = [];
  let results = false;
  for (const { role, content, tool_calls = [] } of messages) {
    const last = out.at(-1);
    if (role === 'tool') {
      const result = `<tool_response>\n${content}\n</tool_response>`;
      // Results that follow each other are one message: many templates demand that roles alternate.
      if (results && last) last.content += `\n${result}`;
      else out.push({ role: 'user', content: result });
    } else {
      const calls = tool_calls.map(
        (call) =>
          `<tool_call>\n${json({ name: call.function.name, arguments: call.function.arguments })}\n</tool_call>`,
      );
      out.push({ role, content: [content, ...calls].filter((part) => part !== '').join('\n') });
    }
    results = role === 'tool';
  }
  if (tools.length === 0) return out;
  const declared = declaration(tools);
  const first = out[0];
  if (first?.role !== 'system') return [{ role: 'system', content: declared }, ...out];
  first.content += `\n\n${declared}`;
  return out;
}

function declaration(tools: readonly unknown[]): string {
  return (
    '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' +
    'You are provided with function signatures within <tools></tools> XML tags:\n' +
    `<tools>\n${tools.map(json).join('\n')}\n</tools>\n\n` +
    'For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n' +
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
  );
}

/** JSON with a space behind each comma and colon, as Python writes it. */
function json(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(json).join(', ')}]`;
  if (typeof value !== 'object' || value === null) return JSON.stringify(value) ?? 'null';
  const entries = Object.entries(value).map(([name, inner]) => `${JSON.stringify(name)}: ${json(inner)}`);
  return `{${entries.join(', ')}}`;
}
