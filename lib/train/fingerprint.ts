/** What the bits of a run depend on, in a form that a checkpoint can keep and another run compare. */
import { createHash, type Hash } from 'node:crypto';
import { setImmediate } from 'node:timers/promises';
import type { RowStore } from '../data/row-store.js';
import type { ModelCore } from '../models/core.js';
import type { LoraAdapter } from '../models/lora-adapter.js';
import type { ResolvedTrainerOptions } from './options.js';

/** Options by name, and what stands for model, adapter and rows. */
export type Settings = Readonly<Record<string, unknown>>;

/** Options that another run may change and still go on: none changes what a step computes from its rows. */
const harmless = new Set([
  'outputDir',
  'device',
  'maxMemory',
  'gradientCheckpointing',
  'activationOffloading',
  'evalSteps',
  'saveSteps',
  'saveTotalLimit',
  'keepBest',
  'earlyStoppingPatience',
  'loggingSteps',
  'reportTo',
  // Whether a changed number of steps matters is asked of the learning rates.
  'maxSteps',
  'epochs',
  // What they come to is compared: the model, the adapter's layers, the encoded rows.
  'model',
  'offline',
  'revision',
  'quantization',
  'computeDtype',
  'lora',
  'initialAdapter',
  'dataset',
  'evalDataset',
]);

/** Rows hashed between two turns of the event loop. */
const slice = 64;

export interface Fingerprinted {
  core: ModelCore;
  adapter: LoraAdapter | undefined;
  options: ResolvedTrainerOptions;
  rows: RowStore;
}

export async function settingsOf({ core, adapter, options, rows }: Fingerprinted): Promise<Settings> {
  const settings: Record<string, unknown> = {};
  for (const [name, value] of Object.entries(options)) {
    if (!harmless.has(name) && value !== undefined) settings[name] = value;
  }
  // Where the state lies does not matter.
  settings.optimizer = options.optimizer.replace('paged_', '');
  settings.computeDtype = core.computeDtype;
  settings.model = await modelHash(core, adapter === undefined);
  settings.lora = adapter ? adapterHash(adapter) : 'none';
  settings.loraInit = initOf(options);
  settings.dataset = await rowsHash(rows);
  return settings;
}

/** PiSSA changes the base, too, and its seed decides how exactly. Otherwise a checkpoint replaces all that was begun with. */
function initOf({ lora, seed }: ResolvedTrainerOptions): string {
  return lora !== 'none' && lora?.init === 'pissa' ? `pissa with seed ${lora.seed ?? seed}` : 'default';
}

/** Number and SHA-256 of encoded rows. */
export async function rowsHash(rows: RowStore): Promise<string> {
  const hash = createHash('sha256');
  const indices = Array.from({ length: rows.count }, (_, i) => i);
  for (let i = 0; i < rows.count; i += slice) {
    for (const { ids, labels } of await rows.rows(indices.slice(i, i + slice))) {
      hash.update(Int32Array.of(ids.length));
      for (const part of [ids, labels]) hash.update(new Uint8Array(part.buffer, part.byteOffset, part.byteLength));
    }
    await setImmediate();
  }
  return `${rows.count} rows, ${short(hash)}`;
}

/**
 * Of config.json, the layers' shapes and ways of storage, and the vectors among the weights, which two models of one
 * architecture do not share. In full training the weights change, and only the former count.
 */
async function modelHash({ configJson, weights }: ModelCore, trainedWhole: boolean): Promise<string> {
  const hash = createHash('sha256').update(JSON.stringify(configJson));
  for (const { path, weight } of weights.linears) {
    const { data, type, blockSize } = weight.tensors;
    hash.update(JSON.stringify([path, weight.N, weight.K, data.dtype, type ?? null, blockSize ?? null]));
  }
  for (const [name, tensor] of weights.dense) {
    hash.update(JSON.stringify([name, tensor.dtype, tensor.shape]));
    if (trainedWhole || tensor.shape.length > 1) continue;
    const bits = await tensor.readBits();
    hash.update(new Uint8Array(bits.buffer, bits.byteOffset, bits.byteLength));
  }
  return short(hash);
}

function adapterHash({ layers, whole }: LoraAdapter): string {
  const shapes = [
    ...layers.map(({ path, r, scale, dropout, magnitude }) => [path, r, scale, dropout, !!magnitude]),
    ...[...whole.tensors].map(([name, { shape }]) => [name, shape]),
  ];
  return `${layers.length} layers, ${short(createHash('sha256').update(JSON.stringify(shapes)))}`;
}

const short = (hash: Hash) => `sha256 ${hash.digest('hex').slice(0, 32)}`;

/** 'learningRate 0.001 (it was 0.01)' for each that differs. */
export function differences(now: Settings, before: Settings): string[] {
  const names = [...new Set([...Object.keys(before), ...Object.keys(now)])];
  const text = (value: unknown) => (value === undefined ? 'nothing' : JSON.stringify(value));
  return names
    .filter((name) => text(now[name]) !== text(before[name]))
    .map((name) => `${name} ${text(now[name])} (it was ${text(before[name])})`);
}
