import { existsSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

/** The folder with this package's package.json: tests run from dist/test or from another build folder. */
export function packageRoot(): string {
  for (let folder = dirname(fileURLToPath(import.meta.url)); ; folder = dirname(folder)) {
    const file = join(folder, 'package.json');
    if (existsSync(file) && (JSON.parse(readFileSync(file, 'utf8')) as { name?: string }).name === 'qlora-node')
      return folder;
    if (folder === dirname(folder)) {
      const { QLORA_ROOT } = process.env;
      if (QLORA_ROOT !== undefined) return QLORA_ROOT;
      throw new Error('No package.json of qlora-node above the tests; set QLORA_ROOT to its folder');
    }
  }
}

/** A folder of references, e.g. 'tokenizers': below the environment's QLORA_REFERENCES, else below test/references. */
export function referencesDir(name: string): string {
  return join(process.env.QLORA_REFERENCES ?? join(packageRoot(), 'test', 'references'), name);
}

export function readJson<T>(...path: string[]): T {
  return JSON.parse(readFileSync(join(...path), 'utf8')) as T;
}
