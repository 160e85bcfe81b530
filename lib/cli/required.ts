import { QLoRAError } from '../errors.js';
import type { PlainOptions } from './config/resolve.js';

/** @throws ERR_QLORA_OPTION_INVALID which names all that is missing */
export function requireOptions(
  options: PlainOptions,
  required: readonly ('model' | 'dataset' | 'outputDir')[],
  file: string | undefined,
): void {
  const missing = required.filter((name) => options[name] === undefined);
  if (missing.length === 0) return;
  const flags = missing.map((name) => `--${name === 'outputDir' ? 'output-dir' : name}`).join(', ');
  throw new QLoRAError(
    'ERR_QLORA_OPTION_INVALID',
    `${file === undefined ? '' : `${file}: `}missing: ${missing.join(', ')}`,
    {
      hint: `Give ${flags}, or set them in a configuration file.`,
      detail: { missing },
    },
  );
}
