/**
 * What a CUDA device does of what it could: 4-bit matmul, decoding, a training step. Random weights, quantized on the
 * device; needs Node and the built files alone.
 *
 *     node dist/bench/cuda.js [--device cuda:0] [--part matmul,decode,train] [--json] [--python PATH]
 *       matmul   --m 1,4,16,64,256,1024,4096 --shape 4096x4096,4096x14336,14336x4096,8192x28672 (inputs x outputs)
 *       decode   --model llama-3.1-8b --batch 1 --prompt 64 --new 128
 *       train    --model llama-3.1-8b --batch 1 --sequence 2048 --checkpointing on (or off, or offloaded) --steps 4; the
 *                loss after them is the same to the last bit with and without offloading
 *                --by-operation: which operations a step's time goes to; each is waited for, so that they sum to more
 *
 * `share` is of the bound that is nearer, the multiply-adds or the reading of memory as `roofline` measures both on this
 * device. Kernels are enqueued by recordings, so that the host's time does not count. With --python PyTorch's bf16
 * matmul and bitsandbytes run beside, in the same minutes; `ratio` is their milliseconds over ours.
 */
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { Tape } from '../lib/autograd.js';
import type { SamplingOptions } from '../lib/generate/scores.js';
import { generateRows } from '../lib/generate/tokens.js';
import type { ModelCore } from '../lib/models/core.js';
import { createAdapter } from '../lib/models/lora-adapter.js';
import { guard, native } from '../lib/native.js';
import { cast } from '../lib/ops/elementwise.js';
import { quantizeWeight } from '../lib/ops/quantize.js';
import { randomUniform } from '../lib/ops/random.js';
import type { Weight } from '../lib/ops/weight.js';
import { type Device, dtypeIndex, Stream, Tensor } from '../lib/tensor.js';
import { enqueueLoss } from '../lib/train/micro-step.js';
import { Optimizer } from '../lib/train/optimizer.js';
import type { ResolvedTrainerOptions } from '../lib/train/options.js';
import { choice, column, count, counts, megabytes, percent, printer, rounded } from './bench.js';
import { flopPerToken } from './floor.js';
import { jsonLines, type Line, peersFolder } from './peer-process.js';
import { llamaShapes, randomModel } from './random-model.js';
import { median } from './timing.js';

const parts = ['matmul', 'decode', 'train'] as const;
/** Weights that go round in a matmul: no cache holds so many bytes. */
const rotatedBytes = 512 * 2 ** 20;

const { values } = parseArgs({
  options: {
    device: { type: 'string', default: 'cuda:0' },
    part: { type: 'string', default: parts.join(',') },
    json: { type: 'boolean', default: false },
    python: { type: 'string' },
    m: { type: 'string', default: '1,4,16,64,256,1024,4096' },
    shape: { type: 'string', default: '4096x4096,4096x14336,14336x4096,8192x28672' },
    model: { type: 'string', default: 'llama-3.1-8b' },
    batch: { type: 'string', default: '1' },
    prompt: { type: 'string', default: '64' },
    new: { type: 'string', default: '128' },
    sequence: { type: 'string', default: '2048' },
    checkpointing: { type: 'string', default: 'on' },
    steps: { type: 'string', default: '4' },
    r: { type: 'string', default: '16' },
    'by-operation': { type: 'boolean', default: false },
  },
});
if (values['by-operation']) process.env.CUDA_LAUNCH_BLOCKING = '1';
const device = values.device as Device;
const batch = count('batch', values.batch);
const model = choice('model', values.model, Object.keys(llamaShapes) as (keyof typeof llamaShapes)[]);
const format = values.json ? 'json' : 'table';

interface Roofline {
  /** FLOP and bytes a second. */
  flops: number;
  bytes: number;
}

async function measureRoofline(stream: Stream): Promise<Roofline> {
  using rates = new Tensor(stream, 'f32', [2], 'scratch');
  stream.run('roofline', rates, dtypeIndex.bf16);
  const [gflops, gigabytes] = (await rates.read()) as Float32Array;
  return { flops: (gflops as number) * 1e9, bytes: (gigabytes as number) * 1e9 };
}

function randomBf16(stream: Stream, shape: readonly number[], seed: number): Tensor {
  using wide = new Tensor(stream, 'f32', shape, 'scratch');
  randomUniform(wide, -0.03, 0.03, 1, seed);
  return cast(undefined, wide, 'bf16');
}

/** Milliseconds a call, of the fastest of five runs of a recording of `enqueue(0 .. calls - 1)`. */
async function recordedMs(stream: Stream, calls: number, enqueue: (i: number) => void): Promise<number> {
  using recording = stream.record(() => {
    for (let i = 0; i < calls; i++) enqueue(i);
  });
  const times: number[] = [];
  // The first run allocates, the second makes the graph.
  for (let i = 0; i < 7; i++) {
    await stream.sync();
    const start = performance.now();
    recording.run();
    await stream.sync();
    times.push((performance.now() - start) / calls);
  }
  return Math.min(...times.slice(2));
}

async function benchMatmul(fields: Line): Promise<void> {
  const columns = [
    column('M', 5, 'm'),
    column('K', 6, 'k'),
    column('N', 6, 'n'),
    column('direction', 9, 'direction'),
    column('ms', 9, 'ms', 4),
    percent('share', 'share'),
    column('torch bf16', 10, 'torchRatio', 2),
    column('bitsandbytes', 12, 'bitsandbytesRatio', 2),
  ];
  const emit = printer({ name: 'cuda-matmul', about: 'NF4, double quantization, bf16', columns }, fields, format);
  const stream = new Stream(device);
  const roofline = await measureRoofline(stream);
  const tokens = counts('m', values.m);
  for (const text of values.shape.split(',')) {
    const [k, n] = counts('shape', text.replace('x', ',')) as [number, number];
    const peers = values.python ? await peerMatmul(values.python, k, n, tokens) : [];
    const weights: Weight[] = [];
    for (let bytes = 0; bytes < rotatedBytes && weights.length < 64; bytes += weights[0]?.sizeBytes ?? 0) {
      using dense = randomBf16(stream, [n, k], weights.length);
      weights.push(await quantizeWeight(dense, { type: 'nf4', blockSize: 64, doubleQuant: true }));
    }
    const weight = (i: number) => weights[i % weights.length] as Weight;
    for (const m of tokens) {
      using x = randomBf16(stream, [m, k], 0);
      using dy = randomBf16(stream, [m, n], 0);
      using y = new Tensor(stream, 'bf16', [m, n]);
      using dx = new Tensor(stream, 'bf16', [m, k]);
      const floor = Math.max((2 * m * n * k) / roofline.flops, weight(0).sizeBytes / roofline.bytes) * 1000;
      let ofBoth = 0;
      for (const [direction, enqueue] of [
        ['forward', (i: number) => stream.run('matmulForward', x, ...weight(i).args, null, y)],
        ['backward', (i: number) => stream.run('matmulBackward', dy, ...weight(i).args, dx)],
      ] as const) {
        const ms = await recordedMs(stream, Math.max(weights.length, 8), enqueue);
        ofBoth += ms;
        // The peers' backward is timed with its forward.
        const ours = direction === 'forward' ? ms : ofBoth;
        const ratio = (op: string) => {
          const line = peers.find((p) => p.op === op && p.m === m && p.pass === direction);
          return line && rounded((line.ms_min as number) / ours);
        };
        emit({
          m,
          k,
          n,
          direction,
          ms: rounded(ms),
          share: rounded(floor / ms),
          torchRatio: ratio('bf16'),
          bitsandbytesRatio: ratio('nf4'),
        });
      }
    }
    for (const w of weights) w.dispose();
  }
  await stream.close();
}

function peerMatmul(python: string, k: number, n: number, m: readonly number[]): Promise<Line[]> {
  const shape = ['--k', String(k), '--n', String(n), '--m', ...m.map(String)];
  const script = join(peersFolder, 'matmul_4bit.py');
  return jsonLines(python, [script, ...shape, '--ops', 'bf16', 'nf4', '--device', 'cuda', '--seconds', '0.2']);
}

async function benchDecode(core: ModelCore, fields: Line, roofline: Roofline): Promise<void> {
  const columns = [
    column('model', 14, 'model'),
    column('batch', 6, 'batch'),
    column('tokens/s', 9, 'decodeTokensPerSecond', 1),
    percent('share', 'share'),
    megabytes('memory', 'peakBytes'),
  ];
  const emit = printer({ name: 'cuda-decode', about: 'greedy, recorded as a graph', columns }, fields, format);
  const [promptLength, newTokens] = [count('prompt', values.prompt), count('new', values.new)];
  const prompt = Array.from({ length: promptLength }, (_, i) => (i * 7919 + 13) % core.config.vocabSize);
  const seconds = async (maxNewTokens: number) => {
    const start = performance.now();
    for await (const _ of generateRows(core, Array(batch).fill(prompt), { ...greedy, maxNewTokens }));
    return (performance.now() - start) / 1000;
  };
  await seconds(3);
  const rates: number[] = [];
  for (let i = 0; i < 3; i++) rates.push((batch * newTokens) / ((await seconds(newTokens + 1)) - (await seconds(1))));
  const { linears, decoder } = core.weights;
  const bytes = linears.reduce((sum, { weight }) => sum + weight.sizeBytes, decoder.head.sizeBytes);
  const decodeTokensPerSecond = rounded(median(rates));
  const share = rounded(((decodeTokensPerSecond / batch) * bytes) / roofline.bytes);
  emit({ model, batch, decodeTokensPerSecond, share, peakBytes: core.stream.memory().peakBytes });
}

const greedy: Omit<SamplingOptions, 'maxNewTokens'> = {
  repetitionPenalty: 1,
  noRepeatNgramSize: 0,
  minNewTokens: 0,
  minLength: 0,
  temperature: 0,
  topK: 0,
  topP: 1,
  typicalP: 1,
  endTokens: new Set(),
  numBeams: 1,
  lengthPenalty: 1,
  earlyStopping: false,
  seed: 0,
  adapter: undefined,
};

const adamw = {
  optimizer: 'adamw_32bit',
  weightDecay: 0,
  maxGradNorm: 0.3,
  adamBeta1: 0.9,
  adamBeta2: 0.999,
  adamEpsilon: 1e-8,
  momentum: 0,
  ademamix: { beta3: 0.9999, alpha: 5 },
  loraPlusRatio: 1,
} as ResolvedTrainerOptions;

async function benchTrain(core: ModelCore, fields: Line, roofline: Roofline): Promise<void> {
  const columns = [
    column('model', 14, 'model'),
    column('batch', 6, 'batch'),
    column('sequence', 8, 'sequence'),
    column('checkpointing', 13, 'checkpointing'),
    column('tokens/s', 9, 'tokensPerSecond', 1),
    percent('share', 'share'),
    megabytes('memory', 'peakBytes'),
    megabytes('of the host', 'pinnedBytes'),
    column('loss', 11, 'loss', 7),
  ];
  const about = 'LoRA on all linear layers, AdamW; every token is a target';
  const emit = printer({ name: 'cuda-train', about, columns }, fields, format);
  const [sequence, steps, r] = [count('sequence', values.sequence), count('steps', values.steps), count('r', values.r)];
  const checkpointing = choice('checkpointing', values.checkpointing, ['on', 'off', 'offloaded']);
  const { stream, config } = core;
  const adapter = createAdapter(core, 'bench', { r, alpha: r });
  const optimizer = await Optimizer.create(adapter.namedParameters, adamw, { totalSteps: steps, computeDtype: 'bf16' });
  const ids = Int32Array.from({ length: sequence }, (_, i) => (i * 7919 + 13) % config.vocabSize);
  const rows = Array.from({ length: batch }, () => [{ ids, labels: ids }]);
  const seconds: number[] = [];
  const pass = {
    adapter: 'bench',
    checkpointing: checkpointing === 'off' ? 'none' : 'blocks',
    keptInputs: checkpointing === 'offloaded' ? 'host' : 'device',
  } as const;
  let loss: number | undefined;
  for (let i = 0; i < steps + 2; i++) {
    await stream.sync();
    if (i === 2) await stream.usage();
    const start = performance.now();
    optimizer.zeroGradients();
    using made = enqueueLoss(core, new Tape(), rows, 1 / (batch * (sequence - 1)), pass);
    optimizer.step(1e-4).dispose();
    await stream.sync();
    seconds.push((performance.now() - start) / 1000);
    loss = (await made.read())[0];
  }
  const tokensPerSecond = rounded((batch * sequence) / median(seconds.slice(2)));
  const { forward, backward, recompute } = flopPerToken(core, sequence, r);
  const flop = forward + backward + (checkpointing === 'off' ? 0 : recompute);
  const share = rounded((tokensPerSecond * flop) / roofline.flops);
  const { peakBytes, pinnedPeakBytes: pinnedBytes } = stream.memory();
  emit({ model, batch, sequence, checkpointing, tokensPerSecond, share, peakBytes, pinnedBytes, loss });
  if (values['by-operation']) await printOperations(stream, fields, steps);
  optimizer.dispose();
}

/** Where a step's time went, the longest first. */
async function printOperations(stream: Stream, fields: Line, steps: number): Promise<void> {
  const columns = [
    column('operation', 28, 'operation'),
    column('calls', 6, 'calls'),
    column('ms', 9, 'ms', 3),
    percent('of all', 'part'),
  ];
  const emit = printer({ name: 'cuda-operations', about: 'of one step', columns }, fields, format);
  const operations = Object.entries((await stream.usage()).operations).sort(([, a], [, b]) => b.seconds - a.seconds);
  const all = operations.reduce((sum, [, { seconds }]) => sum + seconds, 0);
  for (const [operation, { calls, seconds }] of operations) {
    const ms = rounded((seconds * 1000) / steps);
    emit({ operation, calls: calls / steps, ms, part: rounded(seconds / all) });
  }
}

function findDevice() {
  try {
    const { devices } = guard(() => native.cuda());
    const one = devices[Number(device.slice('cuda:'.length))];
    if (one?.error) throw one.error;
    if (one) return one;
    throw new Error(`this machine has ${devices.length} devices`);
  } catch (error) {
    const { message, hint } = error as Error & { hint?: string };
    console.error(`${device} cannot be used: ${message}${hint ? `. ${hint}` : ''}`);
    process.exit(2);
  }
}

const wanted = values.part.split(',').map((part) => choice('part', part, parts));
const found = findDevice();
const probe = new Stream(device);
const roofline = await measureRoofline(probe);
await probe.close();
const fields = {
  device: found.name,
  capability: found.capability,
  rooflineTeraflops: rounded(roofline.flops / 1e12),
  readTerabytesPerSecond: rounded(roofline.bytes / 1e12),
};
if (wanted.includes('matmul')) await benchMatmul(fields);
if (wanted.includes('decode') || wanted.includes('train')) {
  const stream = new Stream(device);
  const core = await randomModel(stream, model);
  if (wanted.includes('decode')) await benchDecode(core, fields, roofline);
  if (wanted.includes('train')) await benchTrain(core, fields, roofline);
  await stream.close();
}
