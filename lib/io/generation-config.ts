/** generation_config.json: how a model wants to be sampled, and where its texts begin and end. */
import { Fields, type JsonObject } from './json.js';

/** Undefined is what the file leaves open. */
export interface GenerationConfig {
  readonly bosTokenId?: number;
  /** All of them; empty where the file names none. */
  readonly eosTokenIds: readonly number[];
  readonly padTokenId?: number;
  readonly doSample?: boolean;
  readonly temperature?: number;
  readonly topK?: number;
  readonly topP?: number;
  readonly typicalP?: number;
  readonly repetitionPenalty?: number;
  readonly noRepeatNgramSize?: number;
  readonly numBeams?: number;
  readonly lengthPenalty?: number;
  readonly maxLength?: number;
  readonly maxNewTokens?: number;
  readonly minLength?: number;
  readonly minNewTokens?: number;
  readonly earlyStopping?: boolean | 'never';
  /** Fields that change what is generated in a way that this version does not do, as the file spells them. */
  readonly unsupported: readonly string[];
}

/** What transformers knows besides, each with the value that changes nothing. */
const unsupported: Readonly<Record<string, unknown>> = {
  bad_words_ids: undefined,
  begin_suppress_tokens: undefined,
  constraints: undefined,
  diversity_penalty: 0,
  dola_layers: undefined,
  encoder_no_repeat_ngram_size: 0,
  encoder_repetition_penalty: 1,
  epsilon_cutoff: 0,
  eta_cutoff: 0,
  exponential_decay_length_penalty: undefined,
  force_words_ids: undefined,
  forced_bos_token_id: undefined,
  forced_eos_token_id: undefined,
  guidance_scale: 1,
  max_time: undefined,
  min_p: 0,
  num_beam_groups: 1,
  num_return_sequences: 1,
  penalty_alpha: 0,
  renormalize_logits: false,
  sequence_bias: undefined,
  stop_strings: undefined,
  suppress_tokens: undefined,
  token_healing: false,
  top_h: undefined,
  watermarking_config: undefined,
};

/**
 * Reads the fields from `object`, which came from `path`. config.json of older models carries the same names.
 *
 * @throws ERR_QLORA_CONFIG_INVALID
 */
export function parseGenerationConfig(path: string, object: JsonObject): GenerationConfig {
  const fields = new Fields(path, object);
  // Negative ids stand for none in some files.
  const id = (key: string): number | undefined => {
    const value = fields.raw(key);
    return typeof value === 'number' && value < 0 ? undefined : fields.count(key);
  };
  return {
    bosTokenId: id('bos_token_id'),
    eosTokenIds:
      typeof fields.raw('eos_token_id') === 'number' && id('eos_token_id') === undefined
        ? []
        : [...new Set(fields.counts('eos_token_id') ?? [])],
    padTokenId: id('pad_token_id'),
    doSample: fields.boolean('do_sample'),
    temperature: fields.number('temperature'),
    topK: fields.count('top_k'),
    topP: fields.number('top_p'),
    typicalP: fields.number('typical_p'),
    repetitionPenalty: fields.number('repetition_penalty'),
    noRepeatNgramSize: fields.count('no_repeat_ngram_size'),
    numBeams: fields.count('num_beams'),
    lengthPenalty: fields.number('length_penalty'),
    maxLength: fields.count('max_length'),
    maxNewTokens: fields.count('max_new_tokens'),
    minLength: fields.count('min_length'),
    minNewTokens: fields.count('min_new_tokens'),
    earlyStopping: fields.raw('early_stopping') === 'never' ? 'never' : fields.boolean('early_stopping'),
    unsupported: Object.keys(unsupported).filter((key) => {
      const value = fields.raw(key);
      return value !== undefined && value !== unsupported[key] && !(Array.isArray(value) && value.length === 0);
    }),
  };
}
