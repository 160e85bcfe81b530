import { didYouMean, QLoRAError } from '../errors.js';

/** Fields of config.json that change nothing that this library computes. */
const harmless = new Set([
  '_name_or_path', '_attn_implementation', '_attn_implementation_autoset', 'architectures', 'attention_dropout', 'dtype',
  'torch_dtype', 'transformers_version', 'use_cache', 'initializer_range', 'pretraining_tp', 'bos_token_id',
  'eos_token_id', 'pad_token_id', 'tokenizer_class', 'id2label', 'label2id', 'return_dict', 'problem_type',
  'chunk_size_feed_forward', 'finetuning_task', 'prefix', 'task_specific_params', 'unsloth_version', 'unsloth_fixed',
  'bad_words_ids', 'begin_suppress_tokens', 'decoder_start_token_id', 'diversity_penalty', 'do_sample',
  'early_stopping', 'encoder_no_repeat_ngram_size', 'exponential_decay_length_penalty', 'forced_bos_token_id',
  'forced_eos_token_id', 'length_penalty', 'max_length', 'min_length', 'no_repeat_ngram_size', 'num_beam_groups',
  'num_beams', 'num_return_sequences', 'remove_invalid_values', 'repetition_penalty', 'sep_token_id', 'suppress_tokens',
  'temperature', 'tf_legacy_loss', 'top_k', 'top_p', 'torchscript', 'typical_p', 'use_bfloat16', 'model_type',
  'quantization_config', 'is_llama_config', 'max_sequence_length', 'neftune_noise_alpha', 'transformers.js_config',
]); // biome-ignore format: a list of names

/** Reads config.json's fields one by one and remembers which were read, so that none that matters is ignored. */
export class ConfigReader {
  readonly #fields: Readonly<Record<string, unknown>>;
  readonly #read = new Set<string>();
  readonly #nested: ConfigReader[] = [];
  readonly #where: string;

  constructor(fields: Readonly<Record<string, unknown>>, where = 'config.json') {
    this.#fields = fields;
    this.#where = where;
  }

  /** Any finite number; an error where it is missing and no default is given. */
  number(name: string, fallback?: number): number {
    const value = this.#take(name) ?? fallback;
    if (typeof value !== 'number' || !Number.isFinite(value)) this.#wrong(name, 'a number', value);
    return value as number;
  }

  /** A positive integer. */
  count(name: string, fallback?: number): number {
    const value = this.number(name, fallback);
    if (!Number.isSafeInteger(value) || value < 1) this.#wrong(name, 'a positive integer', value);
    return value;
  }

  boolean(name: string, fallback: boolean): boolean {
    const value = this.#take(name) ?? fallback;
    if (typeof value !== 'boolean') this.#wrong(name, 'true or false', value);
    return value as boolean;
  }

  string<T extends string>(name: string, accepted: readonly T[], fallback?: T): T {
    const value = this.#take(name) ?? fallback;
    if (!accepted.includes(value as T)) this.#wrong(name, `one of ${accepted.map((a) => `'${a}'`).join(', ')}`, value);
    return value as T;
  }

  strings<T extends string>(name: string, accepted: readonly T[]): T[] {
    const value = this.#take(name);
    if (!Array.isArray(value) || !value.every((v) => accepted.includes(v))) {
      this.#wrong(name, `an array of ${accepted.map((a) => `'${a}'`).join(', ')}`, value);
    }
    return value as T[];
  }

  numbers(name: string): number[] {
    const value = this.#take(name);
    if (!Array.isArray(value) || !value.every((v) => typeof v === 'number' && Number.isFinite(v))) {
      this.#wrong(name, 'an array of numbers', value);
    }
    return value as number[];
  }

  /** A nested object with a reader of its own, which finishes with this one; undefined where there is none. */
  object(name: string): ConfigReader | undefined {
    const value = this.#take(name);
    if (value === undefined) return undefined;
    if (typeof value !== 'object' || Array.isArray(value)) this.#wrong(name, 'an object', value);
    const nested = new ConfigReader(value as Record<string, unknown>, `${this.#where}, ${name}`);
    this.#nested.push(nested);
    return nested;
  }

  has(name: string): boolean {
    return this.#fields[name] !== undefined && this.#fields[name] !== null;
  }

  /** Marks a field as known without using it. */
  skip(...names: string[]): void {
    for (const name of names) this.#read.add(name);
  }

  /** An error where a field was left unread that is neither harmless, null, false, nor allowed. */
  finish(allowed: readonly string[] = []): void {
    for (const [name, value] of Object.entries(this.#fields)) {
      if (this.#read.has(name) || harmless.has(name) || allowed.includes(name) || value === null || value === false)
        continue;
      const near = didYouMean(name, [...this.#read]);
      throw new QLoRAError(
        'ERR_QLORA_CONFIG_UNKNOWN_FIELD',
        `${this.#where}: unknown field '${name}' (${JSON.stringify(value)?.slice(0, 100)}): it may change what the model computes, so it is not ignored`,
        {
          hint: `${near ? `Did you mean '${near}'? ` : ''}If it changes nothing, pass allowUnknownConfig: ['${name}'] to QuantizedModel.load.`,
          detail: { field: name, value },
        },
      );
    }
    for (const nested of this.#nested) nested.finish(allowed);
  }

  #take(name: string): unknown {
    this.#read.add(name);
    return this.#fields[name] ?? undefined;
  }

  #wrong(name: string, expected: string, value: unknown): never {
    throw new QLoRAError(
      'ERR_QLORA_CONFIG_INVALID',
      `${this.#where}: '${name}' must be ${expected}, got ${value === undefined ? 'nothing' : JSON.stringify(value)}`,
      { hint: 'The file may be of another model family, or damaged.', detail: { field: name, value } },
    );
  }
}
