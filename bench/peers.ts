/**
 * What a user would run today beside ours, in the same minutes, with the ratios: transformers + PEFT + bitsandbytes at
 * their best settings, and llama.cpp. Training and generation run in processes of their own, since bitsandbytes' layers
 * train wrongly once they were evaluated.
 *
 *     npm run bench:peers -- --python PATH [--preset tinyllama-1.1b | --model FOLDER] [--only matmul,train] [--json]
 *
 * Nothing else may run meanwhile: theirs spin against it.
 */
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { choice, column, count, printer, rounded } from './bench.js';
import { machineFields } from './machine.js';
import { modelFolder } from './make-model.js';
import { checkLlamaCpp, checkPython, jsonLines, type Line, own, peersFolder } from './peer-process.js';
import { temporaryFolder } from './temporary.js';

const parts = ['matmul', 'load', 'train', 'generate', 'llama.cpp'] as const;
const python = 'transformers + PEFT + bitsandbytes';

interface Setup {
  python: string;
  folder: string;
  batch: string;
  sequence: string;
  threads: string;
  /** Minutes more, and a faster peer on small models. */
  compile: boolean;
}
interface Comparison {
  peer: string;
  what: string;
  setting: string;
  unit: 'ms' | 's' | 'tokens/s' | 'MB';
  theirs: number;
  ours: number;
}
type Emit = (c: Comparison) => void;

const numberOf = (line: Line | undefined, field: string): number => {
  const value = line?.[field];
  if (typeof value !== 'number') throw new Error(`a bench printed no ${field}`);
  return value;
};
const numbersOf = (lines: readonly Line[], field: string): number[] => {
  if (lines.length === 0) throw new Error(`no bench printed ${field} of what is compared`);
  return lines.map((line) => numberOf(line, field));
};
const least = (lines: readonly Line[], field: string) => Math.min(...numbersOf(lines, field));
const most = (lines: readonly Line[], field: string) => Math.max(...numbersOf(lines, field));

const theirs = (setup: Setup, script: string, ...args: string[]) =>
  jsonLines(setup.python, [join(peersFolder, script), ...args, '--threads', setup.threads]);

/** Each of the variants, one after the other. */
async function variants(setup: Setup, script: string, common: string[], each: readonly string[][]): Promise<Line[]> {
  const lines: Line[] = [];
  for (const args of each) lines.push(...(await theirs(setup, script, ...common, ...args)));
  return lines;
}

async function compareMatmul(setup: Setup, emit: Emit): Promise<void> {
  const tokens = [1, 4, 16, 64, 256, 512, 1024, 2048];
  for (const [k, n] of [
    [4096, 4096],
    [2048, 5632],
  ] as const) {
    const shape = ['--k', String(k), '--n', String(n), '--m', ...tokens.map(String)];
    const peer = await theirs(setup, 'matmul_4bit.py', ...shape, '--ops', 'nf4', 'nf4-packed', '--malloc', 'keep');
    // As their script does it, with one layer, which the cache may hold.
    const mine = await own(
      'matmul',
      '--shape',
      `${k}x${n}`,
      '--m',
      tokens.join(','),
      '--layers',
      'one',
      '--seconds',
      '1.5',
    );
    for (const m of tokens) {
      const their = (pass: string) =>
        least(
          peer.filter((line) => line.m === m && line.pass === pass),
          'ms_min',
        );
      const our = (direction: string) =>
        numberOf(
          mine.find((line) => line.m === m && line.direction === direction),
          'ms',
        );
      const common = { peer: 'bitsandbytes', setting: `${k} to ${n}, M ${m}`, unit: 'ms' } as const;
      emit({ ...common, what: 'forward', theirs: their('forward'), ours: our('forward') });
      emit({
        ...common,
        what: 'forward + backward',
        theirs: their('backward'),
        ours: our('forward') + our('backward'),
      });
    }
  }
}

async function compareLoad(setup: Setup, emit: Emit): Promise<void> {
  const peer = await variants(setup, 'qlora_step.py', [setup.folder, '--steps', '0'], [['--malloc', 'keep'], []]);
  const [mine] = await own('load', '--model', setup.folder);
  const common = { peer: python, setting: 'NF4' };
  emit({ ...common, what: 'load', unit: 's', theirs: least(peer, 'load_seconds'), ours: numberOf(mine, 'seconds') });
  const theirPeak = least(peer, 'load_peak_rss_mb');
  emit({ ...common, what: 'peak RSS', unit: 'MB', theirs: theirPeak, ours: megabytesOf(mine) });
}

/** As the peers count: of 2^20 bytes. */
const megabytesOf = (line: Line | undefined) => numberOf(line, 'peakRssBytes') / 2 ** 20;

async function compareTrain(setup: Setup, emit: Emit): Promise<void> {
  const { batch, sequence } = setup;
  const size = ['--batch', batch, '--sequence', sequence];
  for (const checkpointing of ['off', 'on']) {
    const common = [setup.folder, ...size, '--gradient-checkpointing', checkpointing];
    const each = [
      ['--malloc', 'keep'],
      [],
      ...(setup.compile ? [['--compile'], ['--compile', '--malloc', 'keep']] : []),
    ];
    const peer = await variants(setup, 'qlora_step.py', common, each);
    const [mine] = await own('train', '--model', setup.folder, ...size, '--checkpointing', checkpointing);
    const row = { peer: python, setting: `${batch} x ${sequence}, checkpointing ${checkpointing}` };
    emit({
      ...row,
      what: 'train',
      unit: 'tokens/s',
      theirs: most(peer, 'tokens_per_second'),
      ours: numberOf(mine, 'tokensPerSecond'),
    });
    emit({ ...row, what: 'peak RSS', unit: 'MB', theirs: least(peer, 'peak_rss_mb'), ours: megabytesOf(mine) });
  }
}

async function compareGenerate(setup: Setup, emit: Emit): Promise<void> {
  // Decoding is fastest with packed weights; prefill may be so without packing, or without quantization.
  const each = [
    ['--malloc', 'keep'],
    ['--malloc', 'keep', '--base', 'bf16'],
  ];
  const unpacked = ['--malloc', 'keep', '--unpacked', '--new', '4', '--runs', '2'];
  for (const adapter of [[], ['--adapter']]) {
    const peer = await variants(setup, 'generate.py', [setup.folder, ...adapter], [...each, unpacked]);
    const [mine] = await own('generate', '--model', setup.folder, ...adapter);
    const row = { peer: python, setting: adapter.length ? 'with an adapter' : 'base', unit: 'tokens/s' } as const;
    emit({
      ...row,
      what: 'decode',
      theirs: most(peer, 'decode_tokens_per_second'),
      ours: numberOf(mine, 'decodeTokensPerSecond'),
    });
    emit({
      ...row,
      what: 'prefill',
      theirs: most(peer, 'prefill_tokens_per_second'),
      ours: numberOf(mine, 'prefillTokensPerSecond'),
    });
  }
}

async function compareLlamaCpp(setup: Setup, emit: Emit): Promise<void> {
  await checkLlamaCpp(setup.python);
  const llamaCpp = join(peersFolder, 'llama_cpp');
  const gguf = join(temporaryFolder(), 'q4_0.gguf');
  await jsonLines(setup.python, [join(llamaCpp, 'make_gguf.py'), setup.folder, gguf]);
  const [peer] = await jsonLines(process.execPath, ['bench.mjs', gguf, '--threads', setup.threads], llamaCpp);
  const [mine] = await own('generate', '--model', setup.folder);
  const row = { peer: 'llama.cpp', setting: 'Q4_0', unit: 'tokens/s' } as const;
  for (const [what, their, our] of [
    ['decode', 'decode_tokens_per_second', 'decodeTokensPerSecond'],
    ['prefill', 'prefill_tokens_per_second', 'prefillTokensPerSecond'],
  ] as const) {
    emit({ ...row, what, theirs: numberOf(peer, their), ours: numberOf(mine, our) });
  }
}

const compare: Record<(typeof parts)[number], (setup: Setup, emit: Emit) => Promise<void>> = {
  matmul: compareMatmul,
  load: compareLoad,
  train: compareTrain,
  generate: compareGenerate,
  'llama.cpp': compareLlamaCpp,
};

/** How many times as fast ours is; of memory, our share of theirs. */
function ratioOf({ unit, theirs, ours }: Comparison): number {
  return unit === 'ms' || unit === 's' ? theirs / ours : ours / theirs;
}

const table = {
  name: 'peers',
  about: 'theirs at its best settings beside ours; the ratio says how many times as fast, of memory how much of theirs',
  columns: [
    column('peer', python.length, 'peer'),
    column('what', 18, 'what'),
    column('setting', 26, 'setting'),
    column('theirs', 10, 'theirs'),
    column('ours', 10, 'ours'),
    column('unit', 8, 'unit'),
    column('ratio', 7, 'ratio', 2),
  ],
};

async function run(): Promise<void> {
  const { values } = parseArgs({
    options: {
      python: { type: 'string', default: 'python3' },
      model: { type: 'string' },
      preset: { type: 'string', default: 'tinyllama-1.1b' },
      batch: { type: 'string', default: '1' },
      sequence: { type: 'string', default: '512' },
      only: { type: 'string', default: parts.join(',') },
      compile: { type: 'boolean', default: false },
      json: { type: 'boolean', default: false },
    },
  });
  const chosen = values.only.split(',').map((name) => choice('only', name, parts));
  for (const name of ['batch', 'sequence'] as const) count(name, values[name]);
  const versions = await checkPython(values.python);
  const machine = machineFields();
  const { folder, model } = await modelFolder(values);
  const { python, batch, sequence, compile } = values;
  const setup: Setup = { python, folder, batch, sequence, compile, threads: String(machine.threads) };
  if (!values.json) {
    console.log(`${machine.cpu}, ${machine.threads} threads, ${machine.path}; ${model}`);
    console.log([...versions].map((pair) => pair.join(' ')).join(', '));
  }
  const fields = { ...machine, model, versions: Object.fromEntries(versions) };
  const print = printer(table, fields, values.json ? 'json' : 'table');
  for (const name of chosen) {
    try {
      await compare[name](setup, (c) =>
        print({ ...c, theirs: rounded(c.theirs), ours: rounded(c.ours), ratio: rounded(ratioOf(c)) }),
      );
    } catch (error) {
      // One peer that fails does not keep the others from running.
      console.error(`${name}: ${(error as Error).message}`);
      process.exitCode = 1;
    }
  }
}

try {
  await run();
} catch (error) {
  console.error((error as Error).message);
  process.exitCode = 1;
}
