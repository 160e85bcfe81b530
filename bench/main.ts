/** `npm run bench -- NAME [options]` runs one bench; without a name, those that need no model. */
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const withoutModel = ['roofline', 'matmul', 'quantize'];
const [name, ...options] = process.argv.slice(2);
const chosen = name && !name.startsWith('-') ? [name] : withoutModel;
const rest = chosen[0] === name ? options : process.argv.slice(2);
for (const bench of chosen) {
  const file = fileURLToPath(new URL(`./${bench}.js`, import.meta.url));
  if (!existsSync(file))
    throw new Error(`there is no bench '${bench}'; there are train, generate, ${withoutModel.join(', ')}`);
  const { status } = spawnSync(process.execPath, [file, ...rest], { stdio: 'inherit' });
  if (status) process.exitCode = status;
}
