/** What engine.test.ts runs in processes and worker threads of their own: `engine-child.js MODE ARGS`. */
import { createHash } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { constants, type PerformanceEntry, PerformanceObserver } from 'node:perf_hooks';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads';
import { memory, QLoRATrainer, QuantizedModel } from '../../lib/index.js';
import { type MemoryClass, Stream, Tensor } from '../../lib/tensor.js';
import { packageRoot, referencesDir } from './references.js';

const tiny = join(referencesDir('models'), 'llama');
const demo = join(packageRoot(), 'examples', 'demo', 'model');
const sha256 = (array: Float32Array) => createHash('sha256').update(new Uint8Array(array.buffer)).digest('hex');

const rows = Array.from({ length: 8 }, (_, i) => ({
  inputIds: Array.from({ length: 12 + 5 * (i % 4) }, (_, t) => (7 * i + 13 * t) % 200),
}));

async function withTrainer<T>(model: string, work: (trainer: QLoRATrainer) => Promise<T>): Promise<T> {
  const outputDir = mkdtempSync(join(tmpdir(), 'qlora-engine-'));
  try {
    await using trainer = await QLoRATrainer.create({
      model,
      dataset: rows,
      outputDir,
      batchSize: 2,
      gradientAccumulationSteps: 2,
      learningRate: 1e-2,
      lora: { r: 4, dropout: 0.1 },
      seed: 5,
    });
    return await work(trainer);
  } finally {
    rmSync(outputDir, { recursive: true, force: true });
  }
}

/** Everything that must not depend on where, or on how many threads, it runs. */
export function trainingBits(): Promise<string[]> {
  return withTrainer(tiny, async (trainer) => {
    const results: string[] = [];
    for (let step = 0; step < 3; step++) {
      const { loss, gradNorm } = await trainer.trainStep(rows.slice(step, step + 4));
      results.push(`${loss} ${gradNorm}`);
    }
    for (const layer of trainer.adapter?.layers ?? [])
      results.push(sha256(await layer.read('A')), sha256(await layer.read('B')));
    results.push(sha256(await trainer.model.logits(rows[1]?.inputIds ?? [])));
    results.push(String(await trainer.model.loss(rows[2]?.inputIds ?? [])));
    const options = { doSample: true, temperature: 1.5, maxNewTokens: 20, seed: 3, ignoreEos: true };
    results.push(String(await trainer.model.generateTokens([5, 6, 7], options)));
    return results;
  });
}

/** Steps without end, of long rows: something is always in the middle of being computed. */
async function trainForever(): Promise<never> {
  const long = Array.from({ length: 8 }, (_, i) => ({
    inputIds: Array.from({ length: 256 }, (_, t) => (i + 3 * t) % 500),
  }));
  return withTrainer(demo, async (trainer) => {
    for (;;) {
      const step = trainer.trainStep(long);
      parentPort?.postMessage('training');
      await step;
    }
  });
}

const worker = (mode: string) => new Worker(fileURLToPath(import.meta.url), { workerData: [mode] });

/** Creates many tensors and models; returns how far the process grew after the first third. */
/** Resident memory but V8's heap, which grows to a size of its own liking. */
function nativeBytes(): number {
  const { rss, heapTotal } = process.memoryUsage();
  return rss - heapTotal;
}

async function growth(cycle: (i: number) => Promise<void> | void, count: number): Promise<number> {
  const warm = Math.floor(count / 3);
  let before = 0;
  for (let i = 0; i < count; i++) {
    if (i === warm) {
      globalThis.gc?.();
      before = nativeBytes();
    }
    await cycle(i);
    if (i % 500 === 0) await sleep(0);
  }
  globalThis.gc?.();
  await sleep(10);
  return nativeBytes() - before;
}

const leaks: unknown[] = [];
const modes: Record<string, (...args: string[]) => Promise<unknown>> = {
  bits: trainingBits,

  async exit(ms, code) {
    void trainForever();
    await sleep(Number(ms));
    process.exit(Number(code));
  },

  /** exit() while weights are read and quantized. */
  async exitLoading(ms) {
    void QuantizedModel.load(demo);
    await sleep(Number(ms));
    process.exit(0);
  },

  /** A worker is terminated in mid-step; the main thread goes on computing. */
  async terminate(ms) {
    const training = worker('trainForever');
    await new Promise((resolve) => training.once('message', resolve));
    await sleep(Number(ms));
    await training.terminate();
    return (await trainingBits()).length;
  },

  async terminateLoading(ms) {
    const loading = worker('load');
    await new Promise((resolve) => loading.once('online', resolve));
    await sleep(Number(ms));
    await loading.terminate();
    return 'terminated';
  },

  /** A worker ends, by itself or by exit(), with reads under way. */
  async pendingRead(how) {
    const pending = worker(how as string);
    const code = await new Promise((resolve) => pending.once('exit', resolve));
    return { code, live: memory()[0]?.liveBytes };
  },

  /** Nothing is disposed of, and the process ends all the same. */
  async idle() {
    const model = await QuantizedModel.load(demo);
    return model.generate({ instruction: 'What is 12 plus 30?' }, { maxNewTokens: 8 });
  },

  /** Reads that a stream dropped, or that came too late, keep no process alive. */
  async closed() {
    const stream = new Stream();
    const x = Tensor.from(stream, new Float32Array(1_000_000), [1_000_000]);
    const y = new Tensor(stream, 'f32', [1_000_000]);
    for (let i = 0; i < 20; i++) stream.run('add', x, x, y);
    const dropped = y.read().catch((error) => error.code);
    stream.handle.close();
    const late = y.read().catch((error) => error.code);
    return [await dropped, await late, await stream.sync().catch((error) => error.code)];
  },

  async collected() {
    const stream = new Stream();
    const make = () => {
      for (let i = 0; i < 200; i++) Tensor.from(stream, new Float32Array(1000), [1000]);
    };
    make();
    await stream.sync();
    for (let i = 0; i < 20 && stream.memory().liveBytes > 0; i++) {
      globalThis.gc?.();
      await sleep(5);
      await stream.sync();
    }
    return { live: stream.memory().liveBytes, peak: stream.memory().peakBytes };
  },

  /** Full collections of V8 while tensors of 40 GB are made in all, which nothing fills and nobody disposes of. */
  async collections() {
    const count = async (memoryClass: MemoryClass) => {
      let full = 0;
      const isFull = (entry: PerformanceEntry) =>
        (entry as unknown as { detail: { kind: number } }).detail.kind === constants.NODE_PERFORMANCE_GC_MAJOR;
      const observer = new PerformanceObserver((list) => {
        full += list.getEntries().filter(isFull).length;
      });
      observer.observe({ entryTypes: ['gc'] });
      const stream = new Stream();
      leaks.push(Array.from({ length: 40 }, () => new Tensor(stream, 'u8', [2 ** 30], memoryClass)));
      await sleep(50);
      observer.disconnect();
      return full;
    };
    globalThis.gc?.();
    const activations = await count('activations');
    return { activations, scratch: await count('scratch'), weights: await count('weights') };
  },

  async tensorCycles(count, leak) {
    const stream = new Stream();
    const data = new Float32Array(3000);
    const grown = await growth(async (i) => {
      const x = Tensor.from(stream, data, [1000, 3]);
      x.view([3000]).dispose();
      x.dispose();
      if (leak) leaks.push(new Float32Array(3000).fill(i));
      if (i % 100 === 99) await stream.sync();
    }, Number(count));
    await stream.sync();
    return { grown, live: stream.memory().liveBytes };
  },

  async modelCycles(count) {
    const counted: number[] = [];
    const grown = await growth(async () => {
      await using model = await QuantizedModel.load(tiny);
      await model.logits([1, 2, 3]);
      await model.dispose();
      counted.push(memory()[0]?.liveBytes ?? -1);
    }, Number(count));
    return { grown, most: Math.max(...counted) };
  },

  async adapterCycles(count) {
    await using model = await QuantizedModel.load(tiny);
    await model.logits([1, 2, 3]);
    await model.core.stream.sync();
    const before = model.memory().byClass;
    const grown = await growth(async () => {
      model.addLora('a', { r: 8 });
      await model.logits([1, 2, 3]);
      model.removeLora('a');
    }, Number(count));
    await model.core.stream.sync();
    return { grown, before, after: model.memory().byClass };
  },

  /** Pages that the stream's thread was given in the first step, and in each of those after the second. */
  async stepFaults() {
    const long = rows.map((_, i) => ({ inputIds: Array.from({ length: 256 }, (_, k) => (i + 3 * k) % 500) }));
    return withTrainer(demo, async (trainer) => {
      const { stream } = trainer.model.core;
      const counts = [(await stream.usage()).minorFaults];
      for (let step = 0; step < 8; step++) {
        await trainer.trainStep(long);
        counts.push((await stream.usage()).minorFaults);
      }
      const [first, , ...later] = counts.slice(1).map((n, i) => n - (counts[i] as number));
      return { first, later };
    });
  },

  /** How many threads there are, where the system starts only a few. */
  async threads() {
    const stream = new Stream();
    const x = Tensor.from(stream, new Float32Array(100_000).fill(1), [100_000]);
    const y = new Tensor(stream, 'f32', [100_000]);
    stream.run('add', x, x, y);
    return (await y.read()).every((v) => v === 2);
  },
};

const inWorker: Record<string, () => Promise<unknown>> = {
  bits: trainingBits,
  trainForever,
  load: () => QuantizedModel.load(demo),
  async endsWithReads() {
    leaveReads();
  },
  async exitsWithReads() {
    leaveReads();
    process.exit(3);
  },
};

function leaveReads(): void {
  const stream = new Stream();
  const x = Tensor.from(stream, new Float32Array(1_000_000), [1_000_000]);
  for (let i = 0; i < 20; i++) {
    const y = new Tensor(stream, 'f32', [1_000_000]);
    stream.run('add', x, x, y);
    void y.read();
  }
}

if (!isMainThread && Array.isArray(workerData)) {
  parentPort?.postMessage(await inWorker[workerData[0] as string]?.());
} else if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const [mode, ...args] = process.argv.slice(2) as [string, ...string[]];
  console.log(JSON.stringify(await modes[mode]?.(...args)));
}
