/** Names of transformers' TrainingArguments, which qlora.py and LLaMA-Factory share. */
import { z } from 'zod';
import {
  agrees,
  boolean,
  byName,
  ifPositive,
  maps,
  nothing,
  number,
  oneOf,
  type Rules,
  refuses,
  text,
  whenTrue,
  whole,
} from './rules.js';

/** Names of `optim` and ours. */
export const optimizers: Readonly<Record<string, string>> = {
  adamw_torch: 'adamw_32bit',
  adamw_torch_fused: 'adamw_32bit',
  adamw_hf: 'adamw_32bit',
  adamw: 'adamw_32bit',
  adamw_32bit: 'adamw_32bit',
  adamw_8bit: 'adamw_8bit',
  adamw_bnb_8bit: 'adamw_8bit',
  paged_adamw: 'paged_adamw_32bit',
  paged_adamw_32bit: 'paged_adamw_32bit',
  paged_adamw_8bit: 'paged_adamw_8bit',
  lion: 'lion_32bit',
  lion_32bit: 'lion_32bit',
  lion_8bit: 'lion_8bit',
  sgd: 'sgd',
  ademamix: 'ademamix',
};

/** YAML reads an unquoted `no` as text, and `none`; null where nothing stands. */
const off = ['none', 'no', 'None', null] as const;
const isOff = (value: unknown) => (off as readonly unknown[]).includes(value);
const reports = z.union([z.enum(['none', 'None', 'tensorboard']), nothing, z.array(z.enum(['none', 'tensorboard']))]);

/** null stands for the value that is not given. */
const orNull = (schema: z.ZodType) => z.union([schema, nothing]);
const unlessNull = (value: unknown) => value ?? undefined;
const onlyTrue = z.literal(true);
const onlyFalse = z.literal(false);

export const huggingFaceRules: Rules = {
  model_name_or_path: maps('model', text),
  trust_remote_code: agrees(onlyFalse, 'no code of a model is ever run: a model folder is data'),
  do_train: agrees(onlyTrue, 'training is what this command does'),
  do_eval: agrees(boolean, 'evaluation follows from evalDataset and evalSteps'),
  do_predict: agrees(onlyFalse, 'use `qlora-node generate` on the adapter'),
  output_dir: maps('outputDir', text),
  overwrite_output_dir: maps('@overwrite', boolean),
  resume_from_checkpoint: maps('@resume', orNull(z.union([boolean, text])), '', unlessNull),
  per_device_train_batch_size: maps('batchSize', whole),
  per_device_eval_batch_size: agrees(whole, 'evaluation goes by batchSize; its loss does not depend on it'),
  gradient_accumulation_steps: maps('gradientAccumulationSteps', whole),
  learning_rate: maps('learningRate', number),
  num_train_epochs: maps('epochs', number),
  max_steps: maps('maxSteps', whole, '-1: by epochs', ifPositive),
  weight_decay: maps('weightDecay', number),
  max_grad_norm: maps('maxGradNorm', number),
  adam_beta1: maps('adamBeta1', number),
  adam_beta2: maps('adamBeta2', number),
  adam_epsilon: maps('adamEpsilon', number),
  optim: maps('optimizer', oneOf(optimizers), 'see the table of optimizers', byName(optimizers)),
  lr_scheduler_type: maps('lrScheduler', text),
  warmup_ratio: maps('warmupRatio', number),
  warmup_steps: maps('warmupSteps', number, '0: by warmupRatio', ifPositive),
  gradient_checkpointing: maps('gradientCheckpointing', boolean),
  group_by_length: maps('groupByLength', boolean, 'by tokens, not by characters'),
  neftune_noise_alpha: maps('neftuneNoiseAlpha', orNull(number), '', unlessNull),
  bf16: maps('computeDtype', boolean, 'true: bf16', whenTrue('bf16')),
  fp16: maps('computeDtype', boolean, 'true: f16', whenTrue('f16')),
  tf32: agrees(onlyFalse, 'f32 is IEEE fp32 here'),
  logging_steps: maps('loggingSteps', whole),
  logging_strategy: agrees(z.literal('steps'), 'a line every loggingSteps'),
  save_steps: maps('saveSteps', whole),
  save_strategy: agrees(z.literal('steps'), 'a checkpoint every saveSteps'),
  save_total_limit: maps('saveTotalLimit', orNull(whole), '', unlessNull),
  eval_strategy: maps('@evalStrategy', z.enum(['no', 'steps']), 'no: at the end only; steps: by evalSteps'),
  evaluation_strategy: maps('@evalStrategy', z.enum(['no', 'steps']), 'no: at the end only; steps: by evalSteps'),
  eval_steps: maps('@evalSteps', whole, 'counts unless eval_strategy is no'),
  load_best_model_at_end: maps('keepBest', boolean),
  seed: maps('seed', whole),
  data_seed: maps('@dataSeed', whole, 'only where it equals seed, of which everything random follows'),
  report_to: maps('reportTo', reports, 'none or tensorboard; report.html and metrics.jsonl come always', (value) =>
    [value].flat().every(isOff) ? undefined : 'tensorboard',
  ),
  dataloader_num_workers: agrees(
    whole,
    'rows are encoded before training starts, by as many workers as there are cores',
  ),
  remove_unused_columns: agrees(boolean, 'fields that a format does not name are never read'),
  ddp_timeout: agrees(number, 'one process trains'),
  deepspeed: refuses('one process trains on one device'),
  fsdp: refuses('one process trains on one device'),
  push_to_hub: agrees(onlyFalse, 'nothing is uploaded; use `hf upload` on outputDir'),
};
