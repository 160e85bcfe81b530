/** Flags that say how a model is loaded, and loading it with its progress shown. */
import type { Command } from 'commander';
import type { LoadOptions, QuantizedModel } from '../quantized-model.js';
import { allRules } from './config/draft.js';
import { ourRules } from './config/options.js';
import { readConfiguration } from './config/resolve.js';
import { addSettingFlags, rulesFor } from './flags.js';
import type { Output } from './output.js';

const loadTargets = ['quantization', 'computeDtype', 'device', 'offline', 'revision', '@bits'];

export function addLoadFlags(command: Command): () => Promise<LoadOptions> {
  const flags = addSettingFlags(command, rulesFor(allRules('qlora'), loadTargets), rulesFor(ourRules, loadTargets));
  return async () => (await readConfiguration(undefined, flags())).options as LoadOptions;
}

/** On a terminal a line counts the modules while they load. */
export async function loadModel(directory: string, options: LoadOptions, output: Output): Promise<QuantizedModel> {
  const { QuantizedModel: Model } = await import('../quantized-model.js');
  if (!process.stderr.isTTY || output.json) return Model.load(directory, options);
  const clear = () => process.stderr.write('\r\u001b[K');
  try {
    return await Model.load(directory, {
      ...options,
      onProgress: ({ phase, done, total }) =>
        process.stderr.write(`\r${phase} ${directory}: ${Math.floor((100 * done) / total)}%`),
    });
  } finally {
    clear();
  }
}
