/** How a model that leaves this library is to be asked, and where its answers end. */
import { exportedChatTemplate } from '../data/exported-template.js';
import type { Manners } from '../models/companions.js';
import type { ModelCore } from '../models/core.js';
import { endTokensOf, recordOf } from './end-tokens.js';

/** Of the adapter, or of the model itself. */
export function mannersOf(core: ModelCore, adapter: string | undefined): Manners {
  const training = recordOf(core, adapter);
  return {
    training,
    chatTemplate: core.tokenizer && exportedChatTemplate(training, core.tokenizer),
    endTokens: endTokensOf(core, training),
  };
}
