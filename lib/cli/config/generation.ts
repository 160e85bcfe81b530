/** Options of text generation, under our names and under those of transformers and qlora.py. */
import { z } from 'zod';
import { type Draft, translate } from './draft.js';
import type { Setting } from './file.js';
import { agrees, boolean, type Mapped, maps, number, type Rules, whole } from './rules.js';

export const generationRules: Readonly<Record<string, Mapped>> = {
  maxNewTokens: maps('maxNewTokens', whole, 'default 256'),
  minNewTokens: maps('minNewTokens', whole, 'the text does not end before'),
  doSample: maps('doSample', boolean, 'default false: the likeliest token'),
  temperature: maps('temperature', number, 'of sampling; default 1'),
  topK: maps('topK', whole, 'of sampling; default 50, 0: all'),
  topP: maps('topP', number, 'of sampling; default 1'),
  typicalP: maps('typicalP', number, 'of sampling; default 1'),
  repetitionPenalty: maps('repetitionPenalty', number, 'default 1'),
  noRepeatNgramSize: maps('noRepeatNgramSize', whole, 'default 0: none'),
  numBeams: maps('numBeams', whole, 'default 1'),
  lengthPenalty: maps('lengthPenalty', number, 'of beams; default 1'),
  seed: maps('seed', whole, 'of sampling; default 42'),
};

const snake = (name: string) => name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);

export const allGenerationRules: Rules = {
  ...generationRules,
  ...Object.fromEntries(Object.entries(generationRules).map(([name, rule]) => [snake(name), rule])),
  use_cache: agrees(z.literal(true), 'keys and values are always kept'),
};

/** What flags ask for, and where each option was set, for messages. @throws see translate */
export function generationOptions(flags: readonly Setting[]): { options: Record<string, unknown>; places: Draft } {
  const places = translate(flags, allGenerationRules);
  return { options: Object.fromEntries([...places].map(([name, { value }]) => [name, value])), places };
}
