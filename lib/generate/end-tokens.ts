/** Which ids end a text. */
import { templateEndTokens } from '../data/templates.js';
import type { TrainingRecord } from '../io/training-record.js';
import { endTokens, type ModelCore } from '../models/core.js';

/** How the adapter in use was trained; of the base, what a merged model remembers. */
export function recordOf({ adapters, training }: ModelCore, adapter: string | undefined): TrainingRecord | undefined {
  return adapter === undefined ? training : adapters.get(adapter)?.training;
}

/** The model's own end tokens, and those that end an answer in the templates of the training. */
export function endTokensOf(core: ModelCore, record: TrainingRecord | undefined): ReadonlySet<number> {
  const { tokenizer } = core;
  const learnt = tokenizer
    ? [record?.template, record?.chatTemplate].flatMap((name) => templateEndTokens(name, tokenizer))
    : [];
  return new Set([...endTokens(core), ...learnt]);
}
