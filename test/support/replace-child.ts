/** Replaces files that belong together, a system call failing, or the process being killed there (fail_io.cpp). */
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { QLoRAError } from '../../lib/errors.js';
import { writeFileAtomic } from '../../lib/io/atomic-file.js';
import { replaceFiles } from '../../lib/io/atomic-folder.js';

export interface Replaced {
  code?: string;
  /** By file, of those that are there. */
  content: Record<string, string>;
  temporary: string[];
}

const files = ['config.json', 'record.json', 'weights.safetensors'];

/** What lies in a folder. */
export function look(folder: string): Replaced {
  const names = readdirSync(folder);
  const there = files.filter((name) => names.includes(name));
  const content = Object.fromEntries(there.map((name) => [name, readFileSync(join(folder, name), 'utf8')]));
  return { content, temporary: names.filter((name) => name.endsWith('tmp')) };
}

export function prepare(folder: string): void {
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(folder, { recursive: true });
  for (const name of files) writeFileSync(join(folder, name), 'old');
}

async function replace(folder: string): Promise<Replaced> {
  const error = await replaceFiles(folder, 'config.json', [], async (temporary) => {
    for (const name of files) await writeFileAtomic(join(temporary, name), 'new');
  }).then(
    () => undefined,
    (e: QLoRAError) => e,
  );
  delete process.env.FAIL_AT;
  return { ...look(folder), ...(error ? { code: error.code } : {}) };
}

const [folder, calls] = process.argv.slice(2);
if (folder && calls) {
  const outcomes: Replaced[] = [];
  for (let call = 0; call < Number(calls); call++) {
    prepare(folder);
    process.env.FAIL_AT = String(call);
    outcomes.push(await replace(folder));
  }
  console.log(JSON.stringify(outcomes));
} else if (folder) {
  await replace(folder);
}
