import { promptTemplate } from './templates.js';

/** Stands for the instruction; no template holds it. */
const mark = '\u0000';

/**
 * A chat template (Jinja) for a model that was trained with the named prompt template: what a user says is written as an
 * instruction, an answer ends with EOS. A system message comes first, with a blank line behind it.
 *
 * @param bos whether the tokenizer has a token that begins a text
 */
export function exportedChatTemplate(name: string, { bos }: { bos: boolean }): string {
  const { source, tail } = promptTemplate(name);
  const [before, after] = (source({ instruction: mark }) + tail).split(mark) as [string, string];
  return [
    bos ? '{{ bos_token }}' : '',
    '{% for message in messages %}',
    `{% if message['role'] == 'user' %}{{ ${JSON.stringify(before)} + message['content'] + ${JSON.stringify(after)} }}`,
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}",
    `{% else %}{{ message['content'] + "\\n\\n" }}{% endif %}`,
    '{% endfor %}',
  ].join('');
}
