/** Saves over a file again and again, a later system call failing each time (fail_io.cpp), and prints what came of it. */
import { readdir, readFile, writeFile } from 'node:fs/promises';
import { dirname } from 'node:path';
import type { QLoRAError } from '../../lib/errors.js';
import { writeSafetensors } from '../../lib/io/safetensors.js';
import { Stream, Tensor } from '../../lib/tensor.js';

export interface SaveOutcome {
  call: number;
  code?: string;
  message?: string;
  hint?: string;
  content: 'old' | 'new' | 'broken';
  files: string[];
}

const [path, onto, calls] = process.argv.slice(2) as [string, 'stream' | 'background', string];
const values = Float32Array.from({ length: 5000 }, (_, i) => i);
const stream = new Stream();
const tensor = Tensor.from(stream, values, [50, 100]);
const items = [
  { name: 'a', data: onto === 'stream' ? tensor : values, dtype: 'F32' as const, shape: [50, 100] },
  { name: 'b', data: Uint8Array.of(1, 2, 3), dtype: 'U8' as const },
];
delete process.env.FAIL_AT;
await writeSafetensors(path, items);
const whole = await readFile(path);
const outcomes: SaveOutcome[] = [];
for (let call = 0; call < Number(calls); call++) {
  await writeFile(path, 'old');
  const outcome: SaveOutcome = { call, content: 'broken', files: [] };
  process.env.FAIL_AT = String(call);
  await writeSafetensors(path, items).catch(({ code, message, hint }: QLoRAError) =>
    Object.assign(outcome, { code, message, hint }),
  );
  delete process.env.FAIL_AT;
  const content = await readFile(path);
  outcome.content = content.equals(whole) ? 'new' : content.toString() === 'old' ? 'old' : 'broken';
  outcome.files = await readdir(dirname(path));
  outcomes.push(outcome);
}
await stream.close();
console.log(JSON.stringify(outcomes));
