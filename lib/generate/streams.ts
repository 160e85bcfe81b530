/** What generate() and generateTokens() return. */
import { z } from 'zod';
import { encodePrompt } from '../data/prompt.js';
import type { Message } from '../data/rows.js';
import { QLoRAError } from '../errors.js';
import { type EventStream, eventStream } from '../event-stream.js';
import type { ModelCore } from '../models/core.js';
import { checkOptions } from '../options.js';
import type { Tokenizer } from '../tokenizer/tokenizer.js';
import { endTokensOf, recordOf } from './end-tokens.js';
import { type GenerateOptions, resolveGenerateOptions } from './options.js';
import { endsWithStop, StopIds, StopStrings } from './stop-strings.js';
import { generateIds } from './tokens.js';

/**
 * Await it for the whole text, iterate it for pieces: new text only, without stop strings and special tokens. It starts
 * at once; once iterated, a failure is thrown there only.
 */
export type TextStream = EventStream<string, string>;
/** The same with ids. */
export type TokenStream = EventStream<number, number[]>;

const promptSchema = z.union([
  z.string(),
  z.array(z.strictObject({ role: z.enum(['system', 'user', 'assistant', 'tool']), content: z.string() })).min(1),
  z.strictObject({ instruction: z.string(), input: z.string().optional() }),
]);

export const promptsSchema = z.strictObject({ prompts: z.array(promptSchema) });

export function textStream(core: ModelCore, prompt: unknown, options: GenerateOptions): TextStream {
  const abort = new AbortController();
  return eventStream(
    async (emit) => {
      const resolved = resolveGenerateOptions(core, options, 'text');
      checkOptions(z.strictObject({ prompt: promptSchema }), { prompt }, 'generate');
      const tokenizer = tokenizerOf(core);
      const record = recordOf(core, resolved.adapter);
      const ids = encodePrompt(prompt as string | Message[], tokenizer, record);
      const stop = new StopStrings(resolved.stop);
      const decoder = tokenizer.stream({ context: ids });
      let text = '';
      const give = (piece: string) => {
        text += piece;
        if (piece) emit(piece);
      };
      const sampling = {
        ...resolved,
        endTokens: endTokensOf(core, record),
        isWhole: (made: readonly number[]) => endsWithStop(tokenizer, resolved.stop, made),
        signal: joined(resolved.signal, abort.signal),
      };
      for await (const id of generateIds(core, ids, sampling)) {
        give(stop.push(decoder.push(id)));
        if (stop.found) return text;
      }
      give(stop.push(decoder.finish()));
      give(stop.finish());
      return text;
    },
    () => abort.abort(),
  );
}

export function tokenStream(
  core: ModelCore,
  inputIds: ArrayLike<number>,
  options: GenerateOptions & { ignoreEos?: boolean },
): TokenStream {
  const abort = new AbortController();
  return eventStream(
    async (emit) => {
      const resolved = resolveGenerateOptions(core, options, 'tokens');
      const record = recordOf(core, resolved.adapter);
      const tokenizer = resolved.stop.length > 0 ? tokenizerOf(core) : undefined;
      const stop = tokenizer && new StopIds(resolved.stop, tokenizer.stream({ context: inputIds }));
      const ids: number[] = [];
      const give = (id: number) => {
        ids.push(id);
        emit(id);
      };
      const sampling = {
        ...resolved,
        endTokens: resolved.ignoreEos ? new Set<number>() : endTokensOf(core, record),
        ...(tokenizer && { isWhole: (made: readonly number[]) => endsWithStop(tokenizer, resolved.stop, made) }),
        signal: joined(resolved.signal, abort.signal),
      };
      for await (const id of generateIds(core, inputIds, sampling)) {
        for (const sure of stop?.push(id) ?? [id]) give(sure);
        if (stop?.found) return ids;
      }
      for (const sure of stop?.finish() ?? []) give(sure);
      return ids;
    },
    () => abort.abort(),
  );
}

export function tokenizerOf({ tokenizer, directory }: ModelCore): Tokenizer {
  if (tokenizer) return tokenizer;
  throw new QLoRAError('ERR_QLORA_TOKENIZER_MISSING', `${directory} has no tokenizer.json, which text needs`, {
    hint: 'Copy tokenizer.json and tokenizer_config.json into the model folder, or use generateTokens() with ids, without stop.',
  });
}

function joined(a: AbortSignal | undefined, b: AbortSignal): AbortSignal {
  return a ? AbortSignal.any([a, b]) : b;
}
