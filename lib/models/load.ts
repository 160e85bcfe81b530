/** From a model folder to a model that computes, and its end. */
import type { QLoRAError } from '../errors.js';
import { readBnbConfig } from '../io/bnb-checkpoint.js';
import { type ModelFolder, openModelFolder } from '../io/model-folder.js';
import { readTrainingRecord } from '../io/training-record.js';
import { type Device, type FloatDType, Stream } from '../tensor.js';
import { Tokenizer } from '../tokenizer/tokenizer.js';
import { ConfigReader } from './config-reader.js';
import type { ModelCore } from './core.js';
import { familyOf } from './families/index.js';
import { detach } from './lora-adapter.js';
import { loadWeights, type WeightOptions } from './weights.js';

export interface CoreOptions extends WeightOptions {
  computeDtype: FloatDType;
  /** What users call it; default: the folder. */
  name?: string;
  device?: Device;
  /** See Stream. */
  purpose?: 'rehearsal';
  /** Fields of config.json that may be left unread. */
  allowUnknownConfig?: readonly string[];
}

/** On a stream of its own. @throws what QuantizedModel.load() does */
export async function loadCore(directory: string, options: CoreOptions): Promise<ModelCore> {
  const folder = await openModelFolder(directory);
  try {
    return await loadFrom(folder, options);
  } catch (error) {
    folder.close();
    throw error;
  }
}

async function loadFrom(folder: ModelFolder, options: CoreOptions): Promise<ModelCore> {
  const { directory } = folder;
  const family = familyOf(folder.config);
  readBnbConfig(folder.config); // other ways of quantizing are refused here
  const fields = new ConfigReader(folder.config);
  const config = family.config(fields);
  fields.finish(options.allowUnknownConfig);
  const tokenizer = await loadTokenizer(directory);
  const training = await readTrainingRecord(directory);
  const stream = new Stream(options.device ?? 'cpu', options.purpose);
  try {
    const weights = await loadWeights(stream, folder, family, config, options);
    return {
      directory,
      folder,
      name: options.name ?? directory,
      stream,
      family,
      config,
      configJson: folder.config,
      allowUnknownConfig: options.allowUnknownConfig ?? [],
      generation: folder.generationConfig,
      weights,
      computeDtype: options.computeDtype,
      tokenizer,
      training,
      adapters: new Map(),
    };
  } catch (error) {
    await stream.close();
    throw error;
  }
}

/** Frees everything. What was enqueued before is finished first. */
export async function disposeCore(core: ModelCore): Promise<void> {
  const { stream, weights, adapters } = core;
  if (stream.closed) return stream.close();
  for (const adapter of [...adapters.values()]) detach(core, adapter);
  for (const linear of weights.linears) linear.dispose();
  for (const tensor of weights.dense.values()) tensor.dispose();
  core.folder.close();
  await stream.close();
}

/** undefined where the folder has none: ids work without it. */
async function loadTokenizer(directory: string): Promise<Tokenizer | undefined> {
  try {
    return await Tokenizer.load(directory);
  } catch (error) {
    if ((error as QLoRAError).code === 'ERR_QLORA_TOKENIZER_MISSING') return undefined;
    throw error;
  }
}
