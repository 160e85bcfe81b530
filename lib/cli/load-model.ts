/** Flags that say how a model is loaded, and loading it with its progress shown. */
import { access } from 'node:fs/promises';
import { join } from 'node:path';
import type { Command } from 'commander';
import { QLoRAError } from '../errors.js';
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

/**
 * Loads an adapter. Where a run was stopped before it wrote one, the error names its newest checkpoint.
 *
 * @throws what QuantizedModel.loadLora throws
 */
export async function loadAdapter(model: QuantizedModel, name: string, folder: string): Promise<void> {
  try {
    await model.loadLora(name, folder);
  } catch (error) {
    if (!(error instanceof QLoRAError) || error.code !== 'ERR_QLORA_ADAPTER_NOT_FOUND') throw error;
    const { newestCheckpoint } = await import('../train/checkpoint.js');
    const newest = await newestCheckpoint(folder, () => {}).catch(() => undefined);
    if (!newest || !(await isThere(join(newest.path, 'adapter_config.json')))) throw error;
    const goOn = (await isThere(join(folder, 'run.json'))) ? `; \`qlora-node resume ${folder}\` goes on` : '';
    const hint = `This run was stopped: its newest adapter is ${newest.path}${goOn}.`;
    throw new QLoRAError(error.code, error.message, { hint, detail: error.detail, cause: error });
  }
}

export async function isThere(path: string): Promise<boolean> {
  return access(path).then(
    () => true,
    () => false,
  );
}
