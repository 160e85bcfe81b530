import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

/** The demo's folder of sources, with the model, wherever the compiled demo lies below the package. */
export function sourceFolder(): string {
  for (let folder = dirname(fileURLToPath(import.meta.url)); ; folder = dirname(folder)) {
    const sources = join(folder, 'examples', 'demo');
    if (existsSync(join(sources, 'model', 'config.json'))) return sources;
    if (folder === dirname(folder)) throw new Error('examples/demo/model, the bundled model, is missing');
  }
}
