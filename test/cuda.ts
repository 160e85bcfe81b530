/**
 * The conformance suite on a CUDA device: the CPU's own tests of operations with the device as a parameter. Needs
 * Node, the built files and test/references, and nothing else.
 *
 *   node dist/test/cuda.js [--device cuda:0] [word ..]       the files whose names have one of the words
 *
 * QLORA_CUDA=emulated runs the same kernels on the CPU. Exit code 1 where something failed, 2 where the device cannot
 * be used, which is said. A test that a kernel hangs in is named after a while; files after one that broke the device,
 * as an illegal access does, are left out.
 */
import { parseArgs } from 'node:util';
import type { Device } from '../lib/tensor.js';
import { conformanceFiles } from './support/conformance-files.js';

const { values, positionals } = parseArgs({
  options: { device: { type: 'string', default: 'cuda:0' } },
  allowPositionals: true,
});
process.env.QLORA_TEST_DEVICE = values.device;
const device = values.device as Device;
/** Failures of a file. */
const mostShown = 30;
const gibibytes = (bytes: number) => (bytes / 2 ** 30).toFixed(1);

const { native } = await import('../lib/native.js');
const { Stream, Tensor } = await import('../lib/tensor.js');
const { finished, outcome } = await import('./support/testing.js');
try {
  const index = Number(values.device.slice('cuda:'.length));
  const found = native.cuda().devices[index];
  if (!found) throw new Error(`this machine has no device ${device}`);
  if (found.error) throw found.error;
  const free = native.cudaFreeBytes(index);
  console.log(
    `${device}: ${found.name}, compute capability ${found.capability}, ${gibibytes(free)} of ${gibibytes(found.memoryBytes)} GiB free`,
  );
} catch (error) {
  const { message, hint } = error as Error & { hint?: string };
  console.log(`${device} cannot be used: ${message}${hint ? `. ${hint}` : ''}`);
  process.exit(2);
}

/** Whether the device still does what it is told. */
async function works(): Promise<boolean> {
  try {
    const stream = new Stream(device);
    await Tensor.from(stream, Float32Array.of(1), [1]).read();
    await stream.close();
    return true;
  } catch {
    return false;
  }
}

setInterval(() => {
  const { path, since } = outcome.running ?? { path: '', since: Number.POSITIVE_INFINITY };
  const seconds = Math.round((performance.now() - since) / 1000);
  if (seconds > 20) console.log(`${seconds} s in: ${path}`);
}, 10_000).unref();

const files = conformanceFiles.filter((file) => !positionals.length || positionals.some((word) => file.includes(word)));
for (const [i, file] of files.entries()) {
  const [passed, failed] = [outcome.passed, outcome.failures.length];
  try {
    await import(`./${file}.test.js`);
    await finished();
  } catch (error) {
    outcome.failures.push(`${file}: ${(error as Error).stack}`);
  }
  outcome.running = undefined;
  const failures = outcome.failures.slice(failed);
  for (const failure of failures.slice(0, mostShown)) console.log(`not ok ${failure}`);
  if (failures.length > mostShown) console.log(`... and ${failures.length - mostShown} more`);
  console.log(`${file}: ${outcome.passed - passed} passed, ${failures.length} failed`);
  if (failures.length && !(await works())) {
    console.log(`${device} answers nothing any more, as after an illegal access. To learn which:`);
    console.log(`  CUDA_LAUNCH_BLOCKING=1 node dist/test/cuda.js ${file}      names the launch`);
    console.log(`  compute-sanitizer node dist/test/cuda.js ${file}           names the access`);
    for (const left of files.slice(i + 1)) console.log(`left out: ${left}`);
    break;
  }
}
for (const [reason, count] of outcome.skipped) console.log(`skipped ${count}: ${reason}`);
console.log(`${outcome.passed} passed, ${outcome.failures.length} failed`);
process.exitCode = outcome.failures.length ? 1 : 0;
