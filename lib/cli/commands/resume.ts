import type { Command } from 'commander';
import { addOutputFlags, makeOutput } from '../output.js';

interface Flags {
  json?: boolean;
  color?: boolean;
  stopOnUsr1?: boolean;
  checkpoint?: string;
}

export function define(command: Command): void {
  command
    .argument('<run>', "a run's folder, the outputDir of `train`")
    .option('--checkpoint <folder>', 'go on from this one; default: the newest that is whole')
    .option('--stop-on-usr1', 'SIGUSR1 stops as SIGTERM does');
  addOutputFlags(command);
  command.action(async (folder: string, flags: Flags) => {
    const output = makeOutput(flags);
    const { readRunRecord } = await import('../run-folder.js');
    const record = await readRunRecord(folder);
    const { runTraining } = await import('../run-training.js');
    process.exitCode = await runTraining(
      { ...record, resume: flags.checkpoint ?? true, stopOnUsr1: flags.stopOnUsr1 === true },
      output,
    );
  });
}
