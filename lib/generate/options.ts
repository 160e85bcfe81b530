import { z } from 'zod';
import { QLoRAError } from '../errors.js';
import { log } from '../logger.js';
import type { ModelCore } from '../models/core.js';
import { checkOptions } from '../options.js';
import type { SamplingOptions } from './scores.js';

/** An option given here wins over generation_config.json; what neither says is greedy decoding. */
export interface GenerateOptions {
  /** Default 256. */
  maxNewTokens?: number;
  /** Before so many tokens the text does not end; default 0. */
  minNewTokens?: number;
  /** false, the default, is greedy. */
  doSample?: boolean;
  /** Default 1. */
  temperature?: number;
  /** Sample among the k likeliest; default 50, 0 is all. */
  topK?: number;
  /** Sample among the likeliest that together have this probability; default 1. */
  topP?: number;
  /** Sample among those nearest to the entropy that together have this probability; default 1. */
  typicalP?: number;
  /** Above 1 tokens that are there already become less likely, those of the prompt too; default 1. */
  repetitionPenalty?: number;
  /** No so many tokens come twice in the same order, those of the prompt counted; default 0, which allows all. */
  noRepeatNgramSize?: number;
  /** How many texts are followed at once to find the likeliest; default 1. It comes when it is whole. */
  numBeams?: number;
  /** With beams: scores are divided by the length to this power, so above 0 longer texts gain; default 1. */
  lengthPenalty?: number;
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
  minNewTokens: z.int().min(0).optional(),
  doSample: z.boolean().optional(),
  temperature: z.number().min(0).optional(),
  topK: z.int().min(0).optional(),
  topP: z.number().gt(0).max(1).optional(),
  typicalP: z.number().gt(0).max(1).optional(),
  repetitionPenalty: z.number().gt(0).optional(),
  noRepeatNgramSize: z.int().min(0).optional(),
  numBeams: z.int().min(1).optional(),
  lengthPenalty: z.number().optional(),
  stop: z.array(z.string().min(1)).optional(),
  seed: z.int().min(0).optional(),
  adapter: z.string().nullable().optional(),
  signal: z.instanceof(AbortSignal).optional(),
});
const defaults = {
  maxNewTokens: 256,
  minNewTokens: undefined,
  doSample: false,
  temperature: 1,
  topK: 50,
  topP: 1,
  typicalP: 1,
  repetitionPenalty: 1,
  noRepeatNgramSize: 0,
  numBeams: 1,
  lengthPenalty: 1,
  stop: [],
  seed: 42,
};
const tokensSchema = schema.extend({ ignoreEos: z.boolean().optional() });

export type ResolvedGenerateOptions = Omit<SamplingOptions, 'endTokens' | 'isWhole'> & {
  stop: readonly string[];
  ignoreEos: boolean;
};

/** The options that generation_config.json may set as well. */
const fileSchema = schema.omit({ stop: true, seed: true, adapter: true, signal: true });

/** @param what 'tokens' takes ignoreEos too */
export function resolveGenerateOptions(
  core: ModelCore,
  options: GenerateOptions & { ignoreEos?: boolean },
  what: 'text' | 'tokens',
): ResolvedGenerateOptions {
  const given: GenerateOptions & { ignoreEos?: boolean } =
    what === 'text' ? checkOptions(schema, options, 'generate') : checkOptions(tokensSchema, options, 'generateTokens');
  const { generation } = core;
  const [field] = generation.unsupported;
  if (field !== undefined) {
    throw new QLoRAError('ERR_QLORA_GENERATION_CONFIG', `generation_config.json: ${field} is not supported`, {
      hint: 'Take it out of generation_config.json.',
      detail: { field },
    });
  }
  const names = Object.keys(fileSchema.shape) as (keyof typeof fileSchema.shape)[];
  const fromFile = Object.fromEntries(names.map((name) => [name, generation[name]]));
  const merged = {
    ...defaults,
    ...defined(checkOptions(fileSchema, fromFile, 'generation_config.json')),
    ...defined(given),
  };
  const { doSample, signal, ignoreEos, adapter, ...rest } = merged;
  if (!doSample) warnOfSampling(given);
  const { minNewTokens, maxNewTokens } = rest;
  if (minNewTokens !== undefined && minNewTokens > maxNewTokens) {
    throw new QLoRAError(
      'ERR_QLORA_OPTION_CONFLICT',
      `minNewTokens must be at most maxNewTokens, ${maxNewTokens}, got ${minNewTokens}`,
      {
        hint: 'What is not passed comes from generation_config.json, or is the default.',
        detail: { minNewTokens, maxNewTokens },
      },
    );
  }
  return {
    ...rest,
    minNewTokens,
    minLength: generation.minLength ?? 0,
    temperature: doSample ? rest.temperature : 0,
    earlyStopping: generation.earlyStopping ?? false,
    adapter: chooseAdapter(core, adapter),
    ignoreEos: ignoreEos ?? false,
    signal,
  };
}

/** Tells the log of what was given for sampling where nothing is sampled; temperature 0 says so itself. */
function warnOfSampling(given: GenerateOptions): void {
  for (const name of ['temperature', 'topK', 'topP', 'typicalP'] as const) {
    if (given[name] === undefined || (name === 'temperature' && given[name] === 0)) continue;
    log('warn', `option '${name}' changes nothing without doSample: the likeliest token is taken each time`, {
      option: name,
    });
  }
}

function defined<T extends object>(options: T): { [K in keyof T]?: Exclude<T[K], undefined> } {
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined)) as T;
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
