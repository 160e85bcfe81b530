/** A model as a Hugging Face folder that transformers, with bitsandbytes, loads. */
import { join } from 'node:path';
import { removeTemporaryFiles, writeFileAtomic } from '../io/atomic-file.js';
import { replaceFiles } from '../io/atomic-folder.js';
import { bnbConfigJson } from '../io/bnb-checkpoint.js';
import { makeFolder } from '../io/folder.js';
import { pythonJson } from '../io/python-json.js';
import { openSafetensors, type SafetensorsItem, writeSafetensors } from '../io/safetensors.js';
import { trainingRecordName } from '../io/training-record.js';
import { chatTemplateName, companions, copyCompanions, type Manners, writeManners } from './companions.js';
import type { ModelCore } from './core.js';
import { quantizedItems } from './quantized-weight.js';

const weightsName = 'model.safetensors';

export async function saveModel(core: ModelCore, directory: string, manners: Manners): Promise<void> {
  await makeFolder(directory);
  await removeTemporaryFiles(directory);
  const optional = [trainingRecordName, chatTemplateName];
  await replaceFiles(directory, 'config.json', optional, (folder) => writeModel(core, folder, manners));
}

/** The files of a saved model, into a folder that nobody reads yet. */
export async function writeModel(core: ModelCore, directory: string, manners: Manners): Promise<void> {
  const { linears, dense } = core.weights;
  const quantized = linears.filter((linear) => !linear.weight.isDense);
  const items: SafetensorsItem[] = [...dense].map(([name, tensor]) => ({ name, data: tensor }));
  for (const linear of quantized) items.push(...quantizedItems(linear.path, linear.weight));
  await writeSafetensors(join(directory, weightsName), items, { format: 'pt' });
  const config: Record<string, unknown> = { ...core.configJson, ...dtypeFields(core) };
  const [first] = quantized;
  if (first) {
    const { type, nestedAbsmax } = first.weight.tensors;
    const skipModules = linears.filter((linear) => linear.weight.isDense).map((linear) => linear.path);
    config.quantization_config = bnbConfigJson({
      type: type ?? 'int8',
      doubleQuant: nestedAbsmax !== undefined,
      computeDtype: core.computeDtype,
      skipModules: skipModules.length ? [...skipModules, 'lm_head'] : [],
    });
  }
  await writeFileAtomic(join(directory, 'config.json'), `${pythonJson(config, 2)}\n`);
  if (manners.training) {
    await copyCompanions(core, directory);
    await writeManners(core, directory, manners);
  } else {
    await copyCompanions(core, directory, ['generation_config.json', ...companions]);
  }
}

/** After full fine-tuning the weights are fp32 masters, whatever the files had. */
function dtypeFields({ configJson, weights }: ModelCore): Record<string, unknown> {
  const masters = [...weights.dense.values()].every((t) => t.dtype === 'f32');
  return masters ? { ['torch_dtype' in configJson ? 'torch_dtype' : 'dtype']: 'float32' } : {};
}

/** Takes the values that writeModel() wrote of a model that is trained whole, bit for bit: they are fp32 masters. */
export async function restoreModel(core: ModelCore, directory: string): Promise<void> {
  using file = await openSafetensors(join(directory, weightsName));
  for (const [name, tensor] of core.weights.dense) await file.readFinite(name, tensor);
}
