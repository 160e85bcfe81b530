import { didYouMean, QLoRAError } from '../../errors.js';
import type { Family } from '../config.js';
import { llama } from './llama.js';
import { qwen2 } from './qwen2.js';

const families: readonly Family[] = [llama, qwen2];

/** The family of a config.json by its model_type. */
export function familyOf(config: Readonly<Record<string, unknown>>): Family {
  const type = config.model_type;
  const family = families.find((f) => f.modelTypes.includes(type as string));
  if (family) return family;
  const known = families.flatMap((f) => f.modelTypes);
  const near = typeof type === 'string' ? didYouMean(type, known) : undefined;
  throw new QLoRAError(
    'ERR_QLORA_MODEL_UNSUPPORTED',
    `config.json: model_type must be one of ${known.join(', ')}, got ${JSON.stringify(type)}`,
    { hint: near ? `Did you mean '${near}'?` : 'This version knows no other family.', detail: { modelType: type } },
  );
}
