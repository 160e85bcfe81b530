import type { Command } from 'commander';
import { QLoRAError } from '../../errors.js';
import { bytes } from '../../format.js';
import type { MemoryPlan } from '../../train/rehearsal.js';
import { allRules } from '../config/draft.js';
import { ourRules } from '../config/options.js';
import { locate, readConfiguration, trainerOptions } from '../config/resolve.js';
import { addSettingFlags } from '../flags.js';
import { table } from '../format.js';
import { addOutputFlags, makeOutput, writeNote } from '../output.js';
import { requireOptions } from '../required.js';

export function define(command: Command): void {
  command.argument('[config]', 'a file, as for `train`');
  addOutputFlags(command);
  const settings = addSettingFlags(command, allRules('qlora'), ourRules);
  command.action(async (config: string | undefined, flags: { json?: boolean; color?: boolean }) => {
    const output = makeOutput(flags);
    const { options, places, note } = await readConfiguration(config, settings());
    requireOptions(options, ['model', 'dataset'], config);
    if (note !== undefined) writeNote(output, note);
    const [{ planRun }, { resolveTrainerOptions }] = await Promise.all([
      import('../../train/planned-run.js'),
      import('../../train/options.js'),
    ]);
    // Nothing is written.
    const planned = trainerOptions({ ...options, outputDir: options.outputDir ?? '.' });
    const show = (plan: MemoryPlan) => {
      output.object({ type: 'plan', ...plan });
      for (const line of table(
        Object.entries(plan).map(([name, n]) => [name === 'pinned' ? 'pinned, of the host' : name, bytes(n)]),
      ))
        output.line(line);
    };
    try {
      const { memory, datasets } = await planRun(resolveTrainerOptions(planned), 'fit');
      await datasets.close();
      show(memory);
    } catch (error) {
      // What is above maxMemory is shown all the same.
      if (error instanceof QLoRAError && error.code === 'ERR_QLORA_MEMORY_PLAN') show(error.detail?.plan as MemoryPlan);
      throw locate(error, places);
    }
  });
}
