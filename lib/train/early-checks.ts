/** What is wrong with a run and can be known before weights are read and rows are encoded. */
import { dataFiles } from '../data/data-files.js';
import { locate } from '../io/hub.js';
import { openModelFolder } from '../io/model-folder.js';
import { readAdapterConfig } from '../io/peft.js';
import { adaptedModules } from '../io/peft-targets.js';
import { ConfigReader } from '../models/config-reader.js';
import { familyOf } from '../models/families/index.js';
import { adapterConfig, linearPaths } from '../models/lora-adapter.js';
import { listModules } from '../models/weights.js';
import { isMixed, type ResolvedTrainerOptions } from './options.js';

/**
 * Data sets that are paths are there, and the model has modules that the adapter targets.
 *
 * @throws what reading the data and making the adapter would throw
 */
export async function checkEarly(options: ResolvedTrainerOptions): Promise<void> {
  const { dataset, evalDataset, offline, revision, lora, initialAdapter, model } = options;
  const sources = isMixed(dataset) ? dataset.map(({ source }) => source) : [dataset];
  for (const source of [...sources, evalDataset]) if (typeof source === 'string') await dataFiles(source);
  if (lora === 'none') return;
  const linears =
    typeof model === 'string'
      ? await linearsOf(await locate(model, 'model', { offline, revision }))
      : linearPaths(model.core);
  const adapter = initialAdapter && (await locate(initialAdapter, 'adapter', { offline }));
  adaptedModules(adapter ? await readAdapterConfig(adapter) : adapterConfig(lora ?? {}, '', linears), linears);
}

/** Paths of a model's linear layers, from its config.json. */
async function linearsOf(directory: string): Promise<string[]> {
  using folder = await openModelFolder(directory);
  const family = familyOf(folder.config);
  const modules = listModules(family, family.config(new ConfigReader(folder.config)), folder.config);
  return modules.flatMap(({ rule, from }) => (rule.kind === 'linear' ? [from] : []));
}
