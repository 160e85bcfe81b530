/** The options of a run with all defaults, as a file that `train` takes. */
import { stringify } from 'yaml';
import { resolveTrainerOptions } from '../train/options.js';
import { type Configuration, locate, type PlainOptions, trainerOptions } from './config/resolve.js';
import type { Output } from './output.js';

export function printConfig({ options, places, resume, exportDir, note }: Configuration, output: Output): void {
  let resolved: object;
  try {
    resolved = resolveTrainerOptions(trainerOptions(options));
  } catch (error) {
    throw locate(error, places);
  }
  // What the configuration has is shown as it has it: a regular expression is text there.
  const all: PlainOptions = { ...resolved, ...options };
  if (resume !== false) all.resume = resume;
  if (exportDir !== undefined) all.exportDir = exportDir;
  output.object(all);
  output.write(`${note === undefined ? '' : `# ${note}\n`}${stringify(all)}`);
}
