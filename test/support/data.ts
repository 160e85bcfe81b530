/** What the tests of data share. */
import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import type { Test } from 'tap';
import { type EncodedSource, encodeSource, type SourceOptions } from '../../lib/data/encode-source.js';
import type { DatasetSource } from '../../lib/data/read-rows.js';
import { setLogger } from '../../lib/index.js';
import { Tokenizer } from '../../lib/tokenizer/tokenizer.js';
import { referencesDir } from './references.js';

export const llama = await Tokenizer.load(join(referencesDir('tokenizers'), 'llama2-like'));

export const instruction = (i: number) => ({
  instruction: `Question ${i}: ${'the house near the water '.repeat(i % 7)}`,
  ...(i % 3 === 0 && { input: `input ${i}` }),
  output: `answer ${i} `.repeat(1 + (i % 5)),
});

export function encode(source: DatasetSource, options: Partial<SourceOptions> = {}): Promise<EncodedSource> {
  return encodeSource(source, llama, { encoding: {}, vocabSize: 1e6, check: () => {}, ...options });
}

/** A folder for the cache, of this test alone. */
export function useCache(t: Test, folder: string): () => string[] {
  const before = process.env.QLORA_CACHE;
  process.env.QLORA_CACHE = folder;
  t.teardown(() => {
    if (before === undefined) delete process.env.QLORA_CACHE;
    else process.env.QLORA_CACHE = before;
  });
  return () => readdirSync(folder).sort();
}

export async function logged<T>(work: () => Promise<T>): Promise<{ result: T; lines: string[] }> {
  const lines: string[] = [];
  setLogger((level, message) => lines.push(`${level}: ${message}`));
  try {
    return { result: await work(), lines };
  } finally {
    setLogger(null);
  }
}
