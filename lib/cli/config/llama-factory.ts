/** The keys of a LLaMA-Factory file, and what its defaults are where ours differ. */
import { z } from 'zod';
import { huggingFaceRules } from './hugging-face.js';
import {
  agrees,
  boolean,
  byName,
  ifPositive,
  list,
  maps,
  modules,
  nothing,
  number,
  oneOf,
  type Rules,
  refuses,
  splitList,
  text,
  whenTrue,
  whole,
} from './rules.js';

/** Names of `template` whose text differs from ours of that name. */
const templates: Readonly<Record<string, string>> = { alpaca: 'alpaca-llama-factory' };

const tuning: Readonly<Record<string, unknown>> = { lora: undefined, full: 'none' };

const own: Rules = {
  model_revision: maps('revision', text),
  stage: agrees(z.literal('sft'), 'only supervised fine-tuning is done'),
  finetuning_type: maps('lora', oneOf(tuning), 'lora; full: lora none', byName(tuning)),
  lora_rank: maps('lora.r', whole),
  lora_alpha: maps('lora.alpha', number, 'default: twice lora_rank'),
  lora_dropout: maps('lora.dropout', number),
  lora_target: maps('lora.targetModules', list, 'all, or names with commas', modules),
  additional_target: maps('lora.modulesToSave', list, 'names with commas', splitList),
  use_rslora: maps('lora.useRslora', boolean),
  use_dora: maps('lora.useDora', boolean),
  pissa_init: maps('lora.init', boolean, 'true: pissa', whenTrue('pissa')),
  loraplus_lr_ratio: maps('loraPlusRatio', number),
  quantization_bit: maps(
    '@bits',
    z.union([z.literal([4, 8]), nothing]),
    '4: nf4; 8: int8; left out: quantization none',
    (value) => value ?? undefined,
  ),
  quantization_method: agrees(z.enum(['bitsandbytes', 'bnb']), "bitsandbytes' formats are the ones here"),
  quantization_type: maps('quantization.type', z.enum(['nf4', 'fp4'])),
  double_quantization: maps('quantization.doubleQuant', boolean),
  dataset: maps('@datasets', list, 'names of dataset_info.json, or paths', splitList),
  dataset_dir: maps('@datasetDir', text, 'where dataset_info.json is; default data'),
  eval_dataset: maps('@evalDatasets', list, 'one name of dataset_info.json, or a path', splitList),
  template: maps(
    'template',
    text,
    'alpaca is our alpaca-llama-factory',
    (value) => templates[value as string] ?? value,
  ),
  cutoff_len: maps('maxLength', whole),
  max_samples: maps('@maxSamples', whole, 'of each data set'),
  overwrite_cache: agrees(boolean, 'the cache is kept under a key of content and options, so it is never stale'),
  preprocessing_num_workers: agrees(whole, 'as many workers encode as there are cores'),
  train_on_prompt: maps('trainOnSource', boolean),
  mask_history: maps('maskHistory', boolean),
  packing: maps('packing', boolean, 'packed rows never attend to each other'),
  neat_packing: maps('packing', boolean, 'true: packing', whenTrue(true)),
  plot_loss: agrees(boolean, 'report.html always has the curves'),
  val_size: maps('evalDataset', number, 'a share below 1, or a count; 0: none', ifPositive),
  disable_gradient_checkpointing: maps('gradientCheckpointing', boolean, 'true: off', whenTrue(false)),
  use_unsloth_gc: maps('activationOffloading', boolean),
  flash_attn: agrees(
    z.enum(['auto', 'fa2', 'sdpa', 'disabled']),
    'attention always goes by blocks, with the same result',
  ),
  use_unsloth: agrees(z.literal(false), 'the kernels here are its own'),
  adapter_name_or_path: maps('initialAdapter', text),
  export_dir: maps('@exportDir', text, 'the merged model, after training'),
  export_size: refuses('the merged model goes into files of 5 GB'),
  use_swanlab: agrees(z.literal(false), 'TensorBoard files and report.html are written'),
  ray_run_name: refuses('one process trains'),
};
export const llamaFactoryRules: Rules = { ...huggingFaceRules, ...own };

/**
 * What a file of theirs means where it says nothing, and ours would mean something else. lora_alpha, twice the rank, and
 * quantization depend on other keys: see resolve.ts.
 */
export const llamaFactoryDefaults: Readonly<Record<string, unknown>> = {
  batchSize: 8,
  gradientAccumulationSteps: 1,
  learningRate: 5e-5,
  lrScheduler: 'linear',
  warmupRatio: 0,
  maxGradNorm: 1,
  optimizer: 'adamw_32bit',
  maxLength: 2048,
};
export const llamaFactoryRank = 8;
