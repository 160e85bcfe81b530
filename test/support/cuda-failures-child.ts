/** Prints as JSON what becomes of one piece of work on cuda:0: an error, or what it returns. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { QLoRAError } from '../../lib/errors.js';
import { PageFile } from '../../lib/io/page-file.js';
import { scale, zeros } from '../../lib/ops/elementwise.js';
import { gradNorm } from '../../lib/ops/grad-norm.js';
import { optimizerStep } from '../../lib/ops/optimizer.js';
import { Stream, Tensor } from '../../lib/tensor.js';
import { budgetOf } from '../../lib/train/memory-plan.js';
import type { Rehearsal } from '../../lib/train/rehearsal.js';
import { counters } from './optimizer-traces.js';

/** Twenty steps with state of one small parameter in a file. */
async function pagedSteps(stream: Stream, gradient: number, elements: number, slotBytes: number) {
  const folder = mkdtempSync(join(tmpdir(), 'qlora-cuda-'));
  try {
    using file = await PageFile.create(stream, folder, 9 * elements, slotBytes);
    const params = [Tensor.from(stream, new Float32Array(elements), [elements])];
    const gradients = [Tensor.from(stream, new Float32Array(elements).fill(gradient), [elements])];
    const lists = [[file.tensor('f32', [elements])], [file.tensor('f32', [elements])]];
    const norm = gradNorm(stream, gradients);
    const counted = counters(stream, 1);
    const options = { lr: 0.01, weightDecay: 0, maxNorm: 1, beta1: 0.9, beta2: 0.999, eps: 1e-8 };
    for (let step = 0; step < 20; step++) {
      optimizerStep('adamw', { params, gradients, norm, ...counted }, lists, options);
    }
    return [...(await (params[0] as Tensor).read())].every((value) => value === 0) ? 'untouched' : 'updated';
  } finally {
    rmSync(folder, { recursive: true });
  }
}

const works: Record<string, (stream: Stream) => Promise<unknown>> = {
  sync: (stream) => stream.sync(),
  allocate: (stream) => zeros(stream, [3], 'f32').read(),
  launch: (stream) => scale(undefined, Tensor.from(stream, Float32Array.of(1), [1]), 2).read(),
  async limited(stream) {
    stream.setMemoryLimit(1000);
    await zeros(stream, [1000], 'f32').read();
  },
  async writes(stream) {
    const x = new Tensor(stream, 'i32', [10]);
    for (let i = 0; i < 1000; i++) await x.write(new Int32Array(10).fill(i));
    return 'done';
  },
  skippedSteps: (stream) => pagedSteps(stream, Number.NaN, 200_000, 2 ** 20),
  smallSteps: (stream) => pagedSteps(stream, 1, 1000, 2 ** 26),
  async budget(stream) {
    const budget = () => budgetOf({ core: { stream }, options: {} } as unknown as Rehearsal)?.bytes;
    const before = budget();
    const x = zeros(stream, [50_000_000], 'f32');
    await stream.sync();
    x.dispose();
    await stream.sync();
    return [before, budget()];
  },
};

let result: unknown;
try {
  result = await works[process.argv[2] as string]?.(new Stream('cuda:0'));
} catch (error) {
  const { code, message } = error as QLoRAError;
  result = { code, message };
}
process.stdout.write(JSON.stringify(result), () => process.exit(0));
