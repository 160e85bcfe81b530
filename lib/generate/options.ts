import { z } from 'zod';
import { QLoRAError } from '../errors.js';
import type { ModelCore } from '../models/core.js';
import { checkOptions } from '../options.js';
import type { SamplingOptions } from './tokens.js';

/** An option given here wins over generation_config.json; what neither says is greedy decoding. */
export interface GenerateOptions {
  /** Default 256. */
  maxNewTokens?: number;
  /** false is greedy. */
  doSample?: boolean;
  /** Default 1. */
  temperature?: number;
  /** Sample among the k likeliest; default 50, 0 is all. */
  topK?: number;
  /** Sample among the likeliest that together have this probability; default 1. */
  topP?: number;
  /** Texts that end the answer; they are not part of it. */
  stop?: string[];
  /** Of sampling; default 42. The same seed gives the same text. */
  seed?: number;
  /** See AdapterChoice. */
  adapter?: string | null;
  signal?: AbortSignal;
}

const schema = z.strictObject({
  maxNewTokens: z.int().min(1).optional(),
  doSample: z.boolean().optional(),
  temperature: z.number().min(0).optional(),
  topK: z.int().min(0).optional(),
  topP: z.number().gt(0).max(1).optional(),
  stop: z.array(z.string().min(1)).optional(),
  seed: z.int().min(0).optional(),
  adapter: z.string().nullable().optional(),
  signal: z.instanceof(AbortSignal).optional(),
});
const tokensSchema = schema.omit({ stop: true }).extend({ ignoreEos: z.boolean().optional() });

export type ResolvedGenerateOptions = Omit<SamplingOptions, 'endTokens'> & {
  stop: readonly string[];
  ignoreEos: boolean;
};

/** What generation_config.json may ask for that this version does not do; each with the value that changes nothing. */
const unsupported = {
  repetitionPenalty: 1,
  typicalP: 1,
  noRepeatNgramSize: 0,
  numBeams: 1,
  minLength: 0,
  minNewTokens: 0,
} as const;

/** @param what 'text' takes stop strings, 'tokens' takes ignoreEos */
export function resolveGenerateOptions(
  core: ModelCore,
  options: GenerateOptions & { ignoreEos?: boolean },
  what: 'text' | 'tokens',
): ResolvedGenerateOptions {
  const given: GenerateOptions & { ignoreEos?: boolean } =
    what === 'text' ? checkOptions(schema, options, 'generate') : checkOptions(tokensSchema, options, 'generateTokens');
  const { generation } = core;
  for (const [field, neutral] of Object.entries(unsupported)) {
    const value = generation[field as keyof typeof unsupported];
    if (value === undefined || value === neutral) continue;
    throw new QLoRAError(
      'ERR_QLORA_GENERATION_CONFIG',
      `generation_config.json: ${field} = ${JSON.stringify(value)} is not supported yet, only ${JSON.stringify(neutral)}`,
      { hint: `Take it out of generation_config.json.`, detail: { field, value } },
    );
  }
  const doSample = given.doSample ?? generation.doSample ?? false;
  return {
    maxNewTokens: given.maxNewTokens ?? generation.maxNewTokens ?? 256,
    temperature: doSample ? (given.temperature ?? generation.temperature ?? 1) : 0,
    topK: given.topK ?? generation.topK ?? 50,
    topP: given.topP ?? generation.topP ?? 1,
    seed: given.seed ?? 42,
    stop: given.stop ?? [],
    adapter: chooseAdapter(core, given.adapter),
    ignoreEos: given.ignoreEos ?? false,
    signal: given.signal,
  };
}

/**
 * Left out: the only adapter, or the base where there is none; null: the base; left out with several loaded, or an
 * unknown name: an error, never a silent choice.
 */
export function chooseAdapter(core: ModelCore, choice: string | null | undefined): string | undefined {
  const names = [...core.adapters.keys()];
  if (choice === null) return undefined;
  if (choice === undefined) {
    if (names.length <= 1) return names[0];
    throw new QLoRAError(
      'ERR_QLORA_ADAPTER_REQUIRED',
      `several adapters are loaded (${names.join(', ')}), and none was named`,
      { hint: 'Pass { adapter: name }, or null for the base.', detail: { known: names } },
    );
  }
  if (core.adapters.has(choice)) return choice;
  throw new QLoRAError('ERR_QLORA_ADAPTER_UNKNOWN', `no adapter named '${choice}' is loaded`, {
    hint: names.length ? `Loaded are ${names.join(', ')}.` : 'None is loaded: addLora() or loadLora() one.',
    detail: { adapter: choice, known: names },
  });
}
