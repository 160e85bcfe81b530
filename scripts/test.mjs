// Runs tap over the compiled tests and ends with one line, 'N passed, N failed': what failed stands above it in full.
import { spawn } from 'node:child_process';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { createInterface } from 'node:readline';

const require = createRequire(import.meta.url);
const tap = join(dirname(require.resolve('tap/package.json')), 'dist', 'esm', 'run.mjs');
const child = spawn(process.execPath, [tap, '--reporter=tap', ...process.argv.slice(2)], {
  stdio: ['inherit', 'pipe', 'inherit'],
});

let summary;
let failure = [];
for await (const line of createInterface({ input: child.stdout })) {
  const totals = line.match(/^# \{ total: \d+(?:, pass: (\d+))?(?:, fail: (\d+))?/);
  if (totals) summary = { passed: Number(totals[1] ?? 0), failed: Number(totals[2] ?? 0) };
  // A test file's lines are kept until its own result is known, and shown where it failed.
  failure.push(line);
  const result = line.match(/^(not )?ok \d+ - (.*)$/);
  if (!result) continue;
  if (result[1]) for (const kept of failure) console.log(kept);
  else console.log(`ok ${result[2]}`);
  failure = [];
}
const code = await new Promise((resolve) => {
  if (child.exitCode !== null) resolve(child.exitCode);
  else child.once('exit', (exitCode) => resolve(exitCode));
});
// A run that died before its summary has failed, whatever passed until then.
const { passed, failed } = summary ?? { passed: 0, failed: 1 };
console.log(`${passed} passed, ${code && !failed ? 1 : failed} failed`);
process.exitCode = code || (failed ? 1 : 0);
