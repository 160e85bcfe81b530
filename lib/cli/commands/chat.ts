import { createInterface, type Interface } from 'node:readline';
import type { Command } from 'commander';
import { allGenerationRules, generationOptions, generationRules } from '../config/generation.js';
import { addSettingFlags } from '../flags.js';
import { addLoadFlags, loadModel } from '../load-model.js';
import { addOutputFlags, makeOutput } from '../output.js';

interface Flags {
  json?: boolean;
  color?: boolean;
  adapter: string[];
  system?: string;
}

export function define(command: Command): void {
  command
    .argument('<model>', 'a model folder')
    .option(
      '--adapter <[name=]folder>',
      'a PEFT folder; several may be given, the last one speaks',
      (a, all: string[]) => [...all, a],
      [],
    )
    .option('--system <text>', 'the message before all others');
  addOutputFlags(command);
  const generation = addSettingFlags(command, allGenerationRules, generationRules);
  const load = addLoadFlags(command);
  command.addHelpText('after', `\nWhile talking:\n${commandsHelp}`);
  command.action(async (folder: string, flags: Flags) => {
    const output = makeOutput(flags);
    (await import('../show-log.js')).showWarnings(output);
    const { options } = generationOptions(generation());
    await using model = await loadModel(folder, await load(), output);
    const { Conversation } = await import('../conversation.js');
    const conversation = new Conversation(model, options, flags.system, output);
    for (const adapter of flags.adapter) await conversation.load(adapter);

    const interactive = process.stdin.isTTY === true;
    const lines = createInterface({
      input: process.stdin,
      output: interactive ? process.stdout : undefined,
      prompt: '> ',
    });
    // While a text comes Ctrl-C cuts it; at the prompt it ends the talk.
    lines.on('SIGINT', () => {
      if (!conversation.cut()) lines.close();
    });
    if (interactive) {
      output.line('Type a message; /help lists commands, /exit ends.');
      lines.prompt();
    }
    for await (const line of typed(lines)) {
      if (await conversation.take(line.trim())) break;
      if (interactive) lines.prompt();
    }
    lines.close();
    // A terminal that was read ahead would be read on, and keep the process.
    process.stdin.destroy();
  });
}

/** Lines in their order; what is typed while an answer comes waits. */
async function* typed(lines: Interface): AsyncGenerator<string> {
  const waiting: string[] = [];
  let closed = false;
  let wake: (() => void) | undefined;
  lines.on('line', (line) => {
    waiting.push(line);
    wake?.();
  });
  lines.on('close', () => {
    closed = true;
    wake?.();
  });
  for (;;) {
    const line = waiting.shift();
    if (line !== undefined) yield line;
    else if (closed) return;
    else {
      await new Promise<void>((resolve) => {
        wake = resolve;
      });
    }
  }
}

const commandsHelp = `  /adapter NAME|off   who speaks: an adapter, or the base
  /load NAME FOLDER   load an adapter
  /system TEXT        the message before all others, from a new beginning
  /reset              forget what was said
  /exit               end
`;
