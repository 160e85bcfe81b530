/** The commands, each loaded when it is asked for; none of them is needed to print the help. */
import { Command, CommanderError } from 'commander';
import { didYouMean, QLoRAError } from '../errors.js';
import { exitCodes, exitCodesHelp } from './exit-codes.js';
import { isUsageError, writeError } from './output.js';

/** What a file of commands/ exports. */
export interface CommandModule {
  /** Arguments, flags and action. */
  define(command: Command): void;
}

const commands: readonly { name: string; summary: string; load: () => Promise<CommandModule> }[] = [
  { name: 'train', summary: 'fine-tune a model on rows', load: () => import('./commands/train.js') },
  { name: 'resume', summary: 'go on with a run that was stopped', load: () => import('./commands/resume.js') },
  {
    name: 'plan',
    summary: 'the memory that a run would take, before anything is loaded',
    load: () => import('./commands/plan.js'),
  },
  {
    name: 'explain',
    summary: 'what rows become: tokens, what is trained, what is cut',
    load: () => import('./commands/explain.js'),
  },
  { name: 'generate', summary: 'continue a prompt', load: () => import('./commands/generate.js') },
  { name: 'chat', summary: 'talk to a model, with or without adapters', load: () => import('./commands/chat.js') },
  {
    name: 'quantize',
    summary: 'write a model in 4 bits, as bitsandbytes stores it',
    load: () => import('./commands/quantize.js'),
  },
  { name: 'merge', summary: 'write a model with an adapter merged into it', load: () => import('./commands/merge.js') },
  { name: 'info', summary: 'what a model folder or an adapter holds', load: () => import('./commands/info.js') },
  {
    name: 'compare',
    summary: 'the curves of several runs in one page',
    load: () => import('./commands/compare.js'),
  },
  {
    name: 'doctor',
    summary: 'what this machine can run, and why not the rest',
    load: () => import('./commands/doctor.js'),
  },
];

/** Runs the command and sets the exit code. */
export async function main(argv: readonly string[]): Promise<void> {
  // A reader that has seen enough, as `head`, ends no run.
  process.stdout.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code !== 'EPIPE') throw error;
  });
  const program = await makeProgram(argv[2]);
  try {
    await program.parseAsync([...argv]);
  } catch (error) {
    // The help was asked for, and has been written.
    if (error instanceof CommanderError && error.exitCode === 0) return;
    const said = error instanceof CommanderError ? await wrongWords(error, program, argv) : error;
    writeError(said, argv.includes('--json'));
    process.exitCode = isUsageError(said) ? exitCodes.usage : exitCodes.error;
  }
}

/** commander's complaint as an error of ours, with the nearest of all flags, hidden ones too. */
async function wrongWords(error: CommanderError, program: Command, argv: readonly string[]): Promise<QLoRAError> {
  const message = error.message.replace(/^error: /, '').replace(/\n\(Did you mean.*$/s, '');
  const command = program.commands.find((c) => c.name() === argv[2]);
  const given = /unknown (option|command) '([^']*)'/.exec(message);
  if (!given) {
    const hint = `\`qlora-node ${command ? `${command.name()} ` : ''}--help\` says what there is.`;
    return new QLoRAError('ERR_QLORA_OPTION_INVALID', message === '(outputHelp)' ? 'a command is missing' : message, {
      hint,
    });
  }
  const known =
    given[1] === 'command'
      ? program.commands.map((c) => c.name())
      : (command ?? program).options.map((o) => o.long as string);
  const near = (await flagNamed(given[2] as string, known)) ?? didYouMean(given[2] as string, known);
  return new QLoRAError('ERR_QLORA_OPTION_UNKNOWN', message, {
    hint: near ? `Did you mean '${near}'?` : '--help says what there is.',
  });
}

/** --lora-r for --rank. */
async function flagNamed(wrong: string, known: readonly string[]): Promise<string | undefined> {
  const [{ allRules, otherName }, { hyphenated }] = await Promise.all([
    import('./config/draft.js'),
    import('./flags.js'),
  ]);
  const option = otherName(wrong.replace(/^--/, '').replace(/-/g, '_'), allRules('qlora'));
  const flag = option && `--${hyphenated(option)}`;
  return flag && known.includes(flag) ? flag : undefined;
}

async function makeProgram(wanted: string | undefined): Promise<Command> {
  const program = new Command('qlora-node')
    .description('Fine-tune large language models with QLoRA, in 4 bits, without Python.')
    .version(await version(), '-v, --version')
    .exitOverride()
    .configureOutput({ outputError: () => {} })
    .configureHelp({ optionDescription: ({ description }) => description })
    .addHelpText('after', exitCodesHelp);
  for (const { name, summary, load } of commands) {
    const command = program.command(name).summary(summary).description(summary).copyInheritedSettings(program);
    command.addHelpText('after', exitCodesHelp);
    if (wanted === name || (wanted === 'help' && process.argv[3] === name)) (await load()).define(command);
  }
  return program;
}

async function version(): Promise<string> {
  const { readFile } = await import('node:fs/promises');
  const text = await readFile(new URL('../../../package.json', import.meta.url), 'utf8');
  return (JSON.parse(text) as { version: string }).version;
}
