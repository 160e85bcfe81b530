/**
 *     npm run bench                                all of them, in less than 10 minutes, on SmolLM-135M's shape
 *     npm run bench -- --preset tinyllama-1.1b     on another
 *     npm run bench -- NAME [options]              one
 *     npm run bench -- --help                      which there are; NAME --help: what one takes
 *
 * A table for people, or with --json one JSON object a line. Each bench runs in a process of its own.
 * QLORA_NUM_THREADS and QLORA_CPU choose threads and instruction set.
 */
import { spawn } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import attention from './attention.js';
import { type Bench, type Options, printer, type Values } from './bench.js';
import generate from './generate.js';
import load from './load.js';
import { machineFields, unreadSettings } from './machine.js';
import makeModel, { modelFolder, modelOptions } from './make-model.js';
import matmul from './matmul.js';
import quantize from './quantize.js';
import roofline from './roofline.js';
import train from './train.js';

const benches = [roofline, matmul, attention, quantize, load, train, generate, makeModel];

/** What runs where no name is given; those behind `model` run on one. */
const everything = [['roofline'], ['matmul'], ['attention'], ['quantize']];
const everythingOnAModel = [
  ['load'],
  ['train', '--checkpointing', 'off'],
  ['train', '--checkpointing', 'on'],
  ['generate'],
  ['generate', '--adapter'],
];

const common = {
  json: { type: 'boolean', default: false },
  help: { type: 'boolean', default: false },
} as const;

/** The options with their defaults, as one would type them. */
const usage = (options: Options) =>
  Object.entries(options)
    .map(([name, option]) => {
      if (option.type === 'boolean') return `  --${name}`;
      return `  --${name} ${name.toUpperCase()}${option.default === undefined ? '' : ` (${option.default})`}`;
    })
    .join('\n');

async function runOne(bench: Bench, args: string[]): Promise<void> {
  const options = { ...bench.options, ...common };
  const { json: asJson, help, ...rest } = parseArgs({ args, options }).values;
  if (help) return console.log(`${bench.name}: ${bench.about}\n${usage(options)}`);
  await bench.run(rest as Values<Options>, printer(bench, machineFields(), asJson ? 'json' : 'table'));
}

async function runAll(args: string[]): Promise<void> {
  const options = { ...modelOptions, ...common };
  const { values } = parseArgs({ args, options });
  if (values.help) {
    const list = benches.map((b) => `  ${b.name.padEnd(10)}  ${b.about}`).join('\n');
    return console.log(`npm run bench [options], or npm run bench -- NAME [options]\n${list}\n${usage(options)}`);
  }
  const format = values.json ? ['--json'] : [];
  if (!values.json) {
    const { cpu, path, threads } = machineFields();
    console.log(`${cpu}, ${threads} threads, ${path}`);
  }
  for (const command of everything) await runProcess([...command, ...format]);
  const { folder } = await modelFolder(values);
  for (const command of everythingOnAModel) await runProcess([...command, '--model', folder, ...format]);
}

/** A bench that fails does not keep the others from running. */
async function runProcess(args: string[]): Promise<void> {
  const child = spawn(process.execPath, [fileURLToPath(import.meta.url), ...args], { stdio: 'inherit' });
  const status = await new Promise((resolve) => child.once('exit', (code) => resolve(code ?? 1)));
  if (status) process.exitCode = 1;
}

const [name, ...args] = process.argv.slice(2);
for (const variable of unreadSettings()) console.error(`${variable} is set, and no bench reads it`);
try {
  if (!name || name.startsWith('-')) await runAll(process.argv.slice(2));
  else {
    const bench = benches.find((b) => b.name === name);
    if (!bench) throw new Error(`there is no bench '${name}'; there are ${benches.map((b) => b.name).join(', ')}`);
    await runOne(bench, args);
  }
} catch (error) {
  const { message, hint } = error as Error & { hint?: string };
  console.error(hint ? `${message}\n${hint}` : message);
  process.exitCode = 1;
}
