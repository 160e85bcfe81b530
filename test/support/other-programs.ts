/** The names that users of other programs know. */

/** The arguments of qlora.py. */
export const keysOfQlora = [
  'model_name_or_path', 'trust_remote_code',
  'dataset', 'dataset_format', 'eval_dataset_size', 'max_train_samples', 'max_eval_samples', 'source_max_len',
  'target_max_len', 'train_on_source',
  'bits', 'quant_type', 'double_quant', 'full_finetune', 'lora_r', 'lora_alpha', 'lora_dropout', 'lora_modules',
  'max_memory_MB',
  'optim', 'per_device_train_batch_size', 'gradient_accumulation_steps', 'max_steps', 'weight_decay', 'learning_rate',
  'max_grad_norm', 'gradient_checkpointing', 'lr_scheduler_type', 'warmup_ratio', 'logging_steps', 'group_by_length',
  'save_steps', 'save_total_limit', 'output_dir', 'seed', 'adam_beta2',
  'max_new_tokens', 'min_new_tokens', 'do_sample', 'num_beams', 'temperature', 'top_k', 'top_p', 'typical_p',
  'repetition_penalty', 'length_penalty', 'no_repeat_ngram_size', 'use_cache',
  'do_mmlu_eval', 'mmlu_split', 'mmlu_dataset', 'mmlu_source_max_len', 'max_mmlu_samples',
]; // biome-ignore format: a list of names

/** The keys that a LLaMA-Factory file for supervised fine-tuning may carry. */
export const keysOfLlamaFactory = [
  'model_name_or_path', 'stage', 'do_train', 'finetuning_type', 'lora_rank', 'lora_alpha', 'lora_dropout',
  'lora_target', 'additional_target', 'use_rslora', 'use_dora', 'pissa_init', 'loraplus_lr_ratio', 'quantization_bit',
  'quantization_method', 'double_quantization', 'dataset', 'dataset_dir', 'template', 'cutoff_len', 'max_samples',
  'overwrite_cache', 'preprocessing_num_workers', 'train_on_prompt', 'mask_history', 'packing', 'neat_packing',
  'output_dir', 'overwrite_output_dir', 'logging_steps', 'save_steps', 'plot_loss', 'per_device_train_batch_size',
  'gradient_accumulation_steps', 'learning_rate', 'num_train_epochs', 'max_steps', 'lr_scheduler_type', 'warmup_ratio',
  'warmup_steps', 'bf16', 'fp16', 'neftune_noise_alpha', 'val_size', 'per_device_eval_batch_size', 'eval_strategy',
  'eval_steps', 'resume_from_checkpoint', 'seed', 'report_to', 'adapter_name_or_path', 'export_dir', 'export_size',
]; // biome-ignore format: a list of names

/** Keys that ask for what happens anyway: a value that is accepted, and one that is not. */
export const agreed: Readonly<Record<string, readonly [yes: string, no: string | undefined]>> = {
  trust_remote_code: ['false', 'true'],
  do_train: ['true', 'false'],
  do_eval: ['true', '3'],
  do_predict: ['false', 'true'],
  per_device_eval_batch_size: ['8', 'x'],
  tf32: ['false', 'true'],
  logging_strategy: ['steps', 'epoch'],
  save_strategy: ['steps', 'epoch'],
  dataloader_num_workers: ['4', 'x'],
  remove_unused_columns: ['false', 'x'],
  ddp_timeout: ['180000000', 'x'],
  push_to_hub: ['false', 'true'],
  use_cache: ['true', 'false'],
  do_mmlu_eval: ['false', 'true'],
  stage: ['sft', 'dpo'],
  quantization_method: ['bnb', 'gptq'],
  overwrite_cache: ['true', 'x'],
  preprocessing_num_workers: ['16', 'x'],
  plot_loss: ['true', 'x'],
  flash_attn: ['fa2', 'x'],
  use_unsloth: ['false', 'true'],
  use_swanlab: ['false', 'true'],
};
