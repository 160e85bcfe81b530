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
}

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
  };
}
