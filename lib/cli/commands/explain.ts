import type { Command } from 'commander';
import { QLoRAError } from '../../errors.js';
import { allRules } from '../config/draft.js';
import { ourRules } from '../config/options.js';
import { readConfiguration } from '../config/resolve.js';
import { addSettingFlags, rulesFor } from '../flags.js';
import { addOutputFlags, makeOutput } from '../output.js';

/** Options that say what a row becomes. */
const targets = [
  ...['template', 'datasetFormat', 'maxLength', 'sourceMaxLength', 'targetMaxLength', 'trainOnSource', 'maskHistory'],
  ...['model', 'offline', 'revision'],
];

interface Flags {
  json?: boolean;
  color?: boolean;
  rows: string;
  skip: string;
}

export function define(command: Command): void {
  command
    .argument('<data>', 'a file or a folder')
    .option('--rows <n>', 'how many rows to show', '3')
    .option('--skip <n>', 'rows to leave out before', '0');
  addOutputFlags(command);
  const settings = addSettingFlags(command, rulesFor(allRules('qlora'), targets), rulesFor(ourRules, targets));
  command.action(async (data: string, flags: Flags) => {
    const output = makeOutput(flags);
    const { options } = await readConfiguration(undefined, settings());
    if (options.model === undefined) {
      throw new QLoRAError('ERR_QLORA_OPTION_INVALID', 'missing: model', {
        hint: 'Give --model FOLDER: its tokenizer makes the tokens.',
      });
    }
    const [limit, skip] = [count('--rows', flags.rows), count('--skip', flags.skip)];
    const { explainRows } = await import('../explain-rows.js');
    const { model, ...how } = options;
    await explainRows(data, model as string, { ...how, limit, skip }, output);
  });
}

function count(flag: string, text: string): number {
  if (/^\d+$/.test(text)) return Number(text);
  throw new QLoRAError('ERR_QLORA_OPTION_INVALID', `${flag} must be a whole number, got '${text}'`, {
    hint: `${flag} 3`,
  });
}
