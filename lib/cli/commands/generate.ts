import { text as readAll } from 'node:stream/consumers';
import type { Command } from 'commander';
import { QLoRAError } from '../../errors.js';
import { allGenerationRules, generationOptions, generationRules } from '../config/generation.js';
import { locate } from '../config/resolve.js';
import { addSettingFlags } from '../flags.js';
import { addLoadFlags, loadAdapter, loadModel } from '../load-model.js';
import { addOutputFlags, makeOutput } from '../output.js';

interface Flags {
  json?: boolean;
  color?: boolean;
  adapter?: string;
  instruction?: string;
  input?: string;
  chat?: boolean;
  system?: string;
  stop: string[];
}
type Message = { role: 'system' | 'user'; content: string };
type Prompt = string | Message[] | { instruction: string; input?: string };

export function define(command: Command): void {
  command
    .argument('<model>', 'a model folder')
    .argument('[prompt]', 'continued as it is; left out, or -: standard input')
    .option('--adapter <folder>', 'a PEFT folder; left out: the base alone')
    .option('--instruction <text>', 'through the template that the adapter was trained with')
    .option('--input <text>', 'what the instruction is about')
    .option('--chat', 'the prompt is a message, and goes through the chat template')
    .option('--system <text>', 'with --chat: the message before it')
    .option(
      '--stop <text>',
      'ends the answer; may be given several times',
      (text, all: string[]) => [...all, text],
      [],
    );
  addOutputFlags(command);
  const generation = addSettingFlags(command, allGenerationRules, generationRules);
  const load = addLoadFlags(command);
  command.action(async (folder: string, text: string | undefined, flags: Flags) => {
    const output = makeOutput(flags);
    (await import('../show-log.js')).showWarnings(output);
    const { options, places } = generationOptions(generation());
    const prompt = await promptOf(text, flags);
    await using model = await loadModel(folder, await load(), output);
    if (flags.adapter !== undefined) await loadAdapter(model, 'adapter', flags.adapter);
    const stream = model.generate(prompt, { ...options, ...(flags.stop.length > 0 ? { stop: flags.stop } : {}) });
    let whole = '';
    try {
      for await (const piece of stream) {
        whole += piece;
        output.write(piece);
        output.object({ type: 'text', text: piece });
      }
    } catch (error) {
      throw locate(error, places);
    }
    if (!whole.endsWith('\n')) output.line();
    output.object({ type: 'result', text: whole });
  });
}

/** What `echo` and editors put at the end is no part of a prompt: one newline. */
const withoutNewline = (text: string) => text.replace(/\r?\n$/, '');

async function promptOf(text: string | undefined, { instruction, input, chat, system }: Flags): Promise<Prompt> {
  const wrong = (what: string) =>
    new QLoRAError('ERR_QLORA_OPTION_CONFLICT', what, {
      hint: 'Give a prompt, or --instruction, or a prompt with --chat.',
    });
  if (instruction !== undefined) {
    if (text !== undefined || chat) throw wrong('--instruction is the prompt: give no other, and no --chat');
    return input === undefined ? { instruction } : { instruction, input };
  }
  if (input !== undefined) throw wrong('--input goes with --instruction');
  if (system !== undefined && !chat) throw wrong('--system goes with --chat');
  const content = text === undefined || text === '-' ? withoutNewline(await readAll(process.stdin)) : text;
  if (!chat) return content;
  return [...(system === undefined ? [] : [{ role: 'system' as const, content: system }]), { role: 'user', content }];
}
