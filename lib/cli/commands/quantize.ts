import type { Command } from 'commander';
import { bytes } from '../../format.js';
import { addLoadFlags, loadModel } from '../load-model.js';
import { addOutputFlags, makeOutput } from '../output.js';

export function define(command: Command): void {
  command.argument('<model>', 'a model folder').argument('<out>', 'the folder to write');
  addOutputFlags(command);
  const load = addLoadFlags(command);
  command.action(async (folder: string, out: string, flags: { json?: boolean; color?: boolean }) => {
    const output = makeOutput(flags);
    await using model = await loadModel(folder, await load(), output);
    await model.save(out);
    output.line(`written to ${out}: weights of ${bytes(model.sizeBytes)}`);
    output.object({ type: 'result', outputDir: out, sizeBytes: model.sizeBytes });
  });
}
