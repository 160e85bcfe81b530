import type { Command } from 'commander';
import { addLoadFlags, loadAdapter, loadModel } from '../load-model.js';
import { addOutputFlags, makeOutput } from '../output.js';

export function define(command: Command): void {
  command
    .argument('<model>', 'the model folder that the adapter was trained over')
    .argument('<adapter>', 'a PEFT folder')
    .argument('<out>', 'the folder to write, a new one');
  addOutputFlags(command);
  const load = addLoadFlags(command);
  command.addHelpText(
    'after',
    '\nThe adapter is added to the weights as it was trained over them: by default in 4 bits, made 16 bits again.',
  );
  command.action(async (folder: string, adapter: string, out: string, flags: { json?: boolean; color?: boolean }) => {
    const output = makeOutput(flags);
    await using model = await loadModel(folder, await load(), output);
    await loadAdapter(model, 'adapter', adapter);
    (await import('../show-log.js')).showLog(output);
    const { logitDrift } = await model.merge(out, { adapter: 'adapter' });
    output.line(`written to ${out}`);
    output.object({ type: 'result', outputDir: out, logitDrift });
  });
}
