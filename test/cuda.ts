/**
 * The conformance suite on a CUDA device: the CPU's own tests of operations with the device as a parameter. Needs
 * Node, the built files and test/references, and nothing else.
 *
 *   node dist/test/cuda.js [--device cuda:0] [word ..]       the files whose names have one of the words
 *
 * QLORA_CUDA=emulated runs the same kernels on the CPU. Exit code 1 where something failed, 2 where the device cannot
 * be used, which is said.
 */
import { parseArgs } from 'node:util';
import { conformanceFiles } from './support/conformance-files.js';

const { values, positionals } = parseArgs({
  options: { device: { type: 'string', default: 'cuda:0' } },
  allowPositionals: true,
});
process.env.QLORA_TEST_DEVICE = values.device;

const { native } = await import('../lib/native.js');
const { finished, outcome } = await import('./support/testing.js');
try {
  const device = native.cuda().devices[Number(values.device.slice('cuda:'.length))];
  if (!device) throw new Error(`this machine has no device ${values.device}`);
  if (device.error) throw device.error;
  console.log(`${values.device}: ${device.name}, compute capability ${device.capability}`);
} catch (error) {
  const { message, hint } = error as Error & { hint?: string };
  console.log(`${values.device} cannot be used: ${message}${hint ? `. ${hint}` : ''}`);
  process.exit(2);
}

for (const file of conformanceFiles) {
  if (positionals.length && !positionals.some((word) => file.includes(word))) continue;
  const [passed, failed] = [outcome.passed, outcome.failures.length];
  try {
    await import(`./${file}.test.js`);
    await finished();
  } catch (error) {
    outcome.failures.push(`${file}: ${(error as Error).stack}`);
  }
  for (const failure of outcome.failures.slice(failed)) console.log(`not ok ${failure}`);
  console.log(`${file}: ${outcome.passed - passed} passed, ${outcome.failures.length - failed} failed`);
}
for (const [reason, count] of outcome.skipped) console.log(`skipped ${count}: ${reason}`);
console.log(`${outcome.passed} passed, ${outcome.failures.length} failed`);
process.exitCode = outcome.failures.length ? 1 : 0;
