/** Many prompts at once. */
import { encodePrompt, type Prompt } from '../data/prompt.js';
import { QLoRAError } from '../errors.js';
import type { ModelCore } from '../models/core.js';
import { checkOptions } from '../options.js';
import { endTokensOf, recordOf } from './end-tokens.js';
import { type GenerateOptions, resolveGenerateOptions } from './options.js';
import { StopStrings } from './stop-strings.js';
import { promptsSchema, tokenizerOf } from './streams.js';
import { generateRows } from './tokens.js';

/** The texts that generate() would give, but made together: each token of all of them is one pass over the weights. */
export async function generateTexts(core: ModelCore, prompts: unknown, options: GenerateOptions): Promise<string[]> {
  const resolved = resolveGenerateOptions(core, options, 'text');
  checkOptions(promptsSchema, { prompts }, 'generateBatch');
  if (resolved.numBeams > 1) {
    throw new QLoRAError('ERR_QLORA_OPTION_CONFLICT', `generateBatch takes numBeams 1, got ${resolved.numBeams}`, {
      hint: 'Beams are rows of a batch themselves: call generate() for one prompt after the other.',
    });
  }
  const tokenizer = tokenizerOf(core);
  const record = recordOf(core, resolved.adapter);
  const rows = (prompts as readonly Prompt[]).map((prompt) => {
    const ids = encodePrompt(prompt, tokenizer, record);
    return { ids, decoder: tokenizer.stream({ context: ids }), stop: new StopStrings(resolved.stop), text: '' };
  });
  if (rows.length === 0) return [];
  const steps = generateRows(
    core,
    rows.map(({ ids }) => ids),
    { ...resolved, endTokens: endTokensOf(core, record), isOver: (row) => rows[row]?.stop.found ?? true },
  );
  for await (const made of steps) {
    rows.forEach((row, i) => {
      const id = made[i];
      if (id !== undefined) row.text += row.stop.push(row.decoder.push(id));
    });
  }
  return rows.map(({ text, stop, decoder }) => text + stop.push(decoder.finish()) + stop.finish());
}
