import type { Command } from 'commander';
import { allRules } from '../config/draft.js';
import { ourRules } from '../config/options.js';
import { readConfiguration } from '../config/resolve.js';
import { addSettingFlags } from '../flags.js';
import { addOutputFlags, makeOutput, writeNote } from '../output.js';
import { requireOptions } from '../required.js';

interface Flags {
  json?: boolean;
  color?: boolean;
  printConfig?: boolean;
  stopOnUsr1?: boolean;
}

export function define(command: Command): void {
  command
    .argument('[config]', 'a YAML or JSON file with our keys, those of qlora.py or those of LLaMA-Factory')
    .option('--print-config', 'write the options with their defaults, and train nothing')
    .option('--stop-on-usr1', 'SIGUSR1 stops as SIGTERM does');
  addOutputFlags(command);
  const settings = addSettingFlags(command, allRules('qlora'), ourRules);
  command.addHelpText(
    'after',
    "\nFlags win over the file. Every flag also takes qlora.py's and LLaMA-Factory's names: --lora_r, --lora-rank, --cutoff_len.",
  );
  command.action(async (config: string | undefined, flags: Flags) => {
    const output = makeOutput(flags);
    const configuration = await readConfiguration(config, settings());
    const { options, resume, overwrite, exportDir, places, note } = configuration;
    requireOptions(options, ['model', 'dataset', 'outputDir'], config);
    if (flags.printConfig) {
      const { printConfig } = await import('../print-config.js');
      printConfig(configuration, output);
      return;
    }
    if (note !== undefined) writeNote(output, note);
    const { requireUnused, writeRunRecord } = await import('../run-folder.js');
    if (resume === false && !overwrite) await requireUnused(options.outputDir as string);
    const { runTraining } = await import('../run-training.js');
    await writeRunRecord(options.outputDir as string, { options, exportDir });
    process.exitCode = await runTraining(
      { options, resume, exportDir, places, stopOnUsr1: flags.stopOnUsr1 === true },
      output,
    );
  });
}
