import type { Command } from 'commander';
import { addOutputFlags, makeOutput } from '../output.js';

interface Flags {
  json?: boolean;
  color?: boolean;
  out: string;
}

export function define(command: Command): void {
  command
    .argument('<run...>', 'folders of runs, two or more')
    .option('--out <file>', 'the page to write', 'compare.html');
  addOutputFlags(command);
  command.action(async (runs: string[], flags: Flags) => {
    const output = makeOutput(flags);
    const { compareRuns } = await import('../../report/compare.js');
    await compareRuns(runs, flags.out);
    output.line(`written to ${flags.out}`);
    output.object({ type: 'result', file: flags.out });
  });
}
