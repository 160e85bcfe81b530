/** What a command writes, for people or for programs. */
import { inspect } from 'node:util';
import type { Command } from 'commander';
import { QLoRAError } from '../errors.js';
import type { LogLevel } from '../logger.js';

export interface Output {
  readonly json: boolean;
  /** Whether standard output is a terminal. */
  readonly terminal: boolean;
  readonly color: boolean;
  /** A line for people; nothing with --json. */
  line(text?: string): void;
  /** An object for programs; nothing without --json. */
  object(value: object): void;
  /** Text without a line's end, for people. */
  write(text: string): void;
}

export function makeOutput({ json = false, color }: { json?: boolean; color?: boolean }): Output {
  const terminal = process.stdout.isTTY === true;
  return {
    json,
    terminal,
    color: color ?? (terminal && (process.env.NO_COLOR ?? '') === ''),
    line: (text = '') => {
      if (!json) process.stdout.write(`${text}\n`);
    },
    object: (value) => {
      if (json) process.stdout.write(`${JSON.stringify(value)}\n`);
    },
    write: (text) => {
      if (!json) process.stdout.write(text);
    },
  };
}

/** A line of the log, as a run writes them. */
export function writeNote(output: Output, message: string, level: LogLevel = 'info'): void {
  output.line(level === 'info' ? message : `${level}: ${message}`);
  output.object({ type: 'log', level, message });
}

/** What hints call by the names of a program, as flags. */
const inFlags: readonly (readonly [RegExp, string])[] = [
  [/The docstrings of the options say/, '`qlora-node train --help`, `qlora-node generate --help` and docs/cli.md say'],
  [/then the adapter with loadLora\(\)/, 'and give this one as --adapter'],
  [/addLora\(\) or loadLora\(\) one/, 'give one as --adapter'],
  [/\bresume: true finds/, '--resume finds'],
  [/\boffline: true\b/, '--offline'],
];

/** On standard error: message, hint and code; the stack only where DEBUG is set. */
export function writeError(error: unknown, json: boolean): void {
  const { message, name } = error instanceof Error ? error : { message: String(error), name: 'Error' };
  const { code = name, hint: said, detail } = error as Partial<QLoRAError>;
  const hint = said && inFlags.reduce((text, [api, flag]) => text.replace(api, flag), said);
  if (json) process.stderr.write(`${JSON.stringify({ type: 'error', code, message, hint, detail })}\n`);
  else process.stderr.write(`error: ${message}\n${hint ? `hint: ${hint}\n` : ''}code: ${code}\n`);
  if (process.env.DEBUG) process.stderr.write(`${inspect(error)}\n`);
}

/** Wrong words of the one who called, rather than something that went wrong. */
export function isUsageError(error: unknown): boolean {
  return error instanceof QLoRAError && /^ERR_QLORA_(OPTION_|CONFIG_FILE|OUTPUT_EXISTS)/.test(error.code);
}

export function addOutputFlags(command: Command): void {
  command
    .option('--json', 'one JSON object a line, for programs')
    .option('--color', 'colours, whatever the output is')
    .option('--no-color', 'no colours; so does the environment variable NO_COLOR');
  // Neither given: as the terminal is.
  command.setOptionValue('color', undefined);
}
