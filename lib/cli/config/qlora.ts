/** The arguments of qlora.py. */
import { z } from 'zod';
import { huggingFaceRules } from './hugging-face.js';
import {
  agrees,
  boolean,
  byName,
  list,
  maps,
  modules,
  number,
  oneOf,
  type Rules,
  refuses,
  text,
  whenTrue,
  whole,
} from './rules.js';

/** Names of `dataset_format` and ours. */
const formats: Readonly<Record<string, string>> = {
  alpaca: 'alpaca',
  'alpaca-clean': 'alpaca-clean',
  chip2: 'chip2',
  'self-instruct': 'self-instruct',
  'hh-rlhf': 'hh-rlhf',
  oasst1: 'oasst1',
  longform: 'longform',
  'input-output': 'longform',
};

const megabytes = (value: unknown) => Math.floor((value as number) * 1e6);
const whereGenerating = 'counts when text is generated: pass it to `qlora-node generate`';
const noMmlu = 'this version has no MMLU evaluation';

const own: Rules = {
  dataset: maps('dataset', text),
  dataset_format: maps('datasetFormat', oneOf(formats), '', byName(formats)),
  eval_dataset_size: maps('evalDataset', number, 'a share below 1, or a count'),
  max_train_samples: maps('maxTrainSamples', whole),
  max_eval_samples: maps('maxEvalSamples', whole),
  source_max_len: maps('sourceMaxLength', whole),
  target_max_len: maps('targetMaxLength', whole),
  train_on_source: maps('trainOnSource', boolean),
  bits: maps(
    '@bits',
    z.literal([4, 8, 16, 32]),
    '4: quantization.type; 8: int8; 16: quantization none; 32: and computeDtype f32',
  ),
  quant_type: maps('quantization.type', z.enum(['nf4', 'fp4'])),
  double_quant: maps('quantization.doubleQuant', boolean),
  full_finetune: maps('lora', boolean, 'true: lora none; needs bits 16 or 32', whenTrue('none')),
  lora_r: maps('lora.r', whole),
  lora_alpha: maps('lora.alpha', number),
  lora_dropout: maps('lora.dropout', number),
  lora_modules: maps('lora.targetModules', list, 'all, or names with commas', modules),
  max_memory_MB: maps('maxMemory', number, 'in 1,000,000 bytes', megabytes),
  max_new_tokens: refuses(whereGenerating),
  min_new_tokens: refuses(whereGenerating),
  do_sample: refuses(whereGenerating),
  num_beams: refuses(whereGenerating),
  temperature: refuses(whereGenerating),
  top_k: refuses(whereGenerating),
  top_p: refuses(whereGenerating),
  typical_p: refuses(whereGenerating),
  repetition_penalty: refuses(whereGenerating),
  length_penalty: refuses(whereGenerating),
  no_repeat_ngram_size: refuses(whereGenerating),
  use_cache: agrees(z.literal(true), 'keys and values are always kept while generating, and never while training'),
  do_mmlu_eval: agrees(z.literal(false), noMmlu),
  mmlu_split: refuses(noMmlu),
  mmlu_dataset: refuses(noMmlu),
  mmlu_source_max_len: refuses(noMmlu),
  max_mmlu_samples: refuses(noMmlu),
};

export const qloraRules: Rules = { ...huggingFaceRules, ...own };
