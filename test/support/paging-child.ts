/** A process whose disk fails under paged state (test/support/fail_io.cpp): says what became of it, as JSON. */
import { join } from 'node:path';
import type { QLoRAError } from '../../lib/errors.js';
import { Stream } from '../../lib/tensor.js';
import { Optimizer } from '../../lib/train/optimizer.js';
import { bitsOf, optionsOf, parametersOf, takeSteps } from './optimizer-runs.js';

const directory = process.argv[2] as string;
const stream = new Stream();
const parameters = parametersOf(stream);
const codeOf = (work: Promise<unknown>) =>
  work.then(
    () => 'fine',
    (error: QLoRAError) => error.code,
  );
let optimizer: Optimizer | undefined;
try {
  optimizer = await Optimizer.create(parameters, optionsOf({}), {
    totalSteps: 10,
    computeDtype: 'f32',
    paging: { residentBytes: 0, directory, slotBytes: 2 ** 20 },
  });
  await takeSteps(optimizer, parameters, [1, 2]);
  process.stdout.write(JSON.stringify({ bits: await bitsOf(parameters) }));
} catch (e) {
  const { name, code, hint } = e as QLoRAError;
  const later = optimizer && [
    await codeOf(takeSteps(optimizer, parameters, [3])),
    await codeOf(bitsOf(parameters)),
    await codeOf(optimizer.save(join(directory, '..', 'state.safetensors'))),
  ];
  process.stdout.write(JSON.stringify({ error: { name, code, hint }, later }));
}
await stream.close();
