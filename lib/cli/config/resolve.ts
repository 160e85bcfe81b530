/** A configuration's file and flags as options of the trainer, in a form that run.json keeps. */
import { QLoRAError } from '../../errors.js';
import type { TrainerOptions } from '../../train/options.js';
import { type DatasetSpec, sourcesOf } from './datasets.js';
import {
  allRules,
  atPlace,
  conflict,
  type Dialect,
  type Draft,
  dialectOf,
  type Entry,
  nestedKeys,
  translate,
} from './draft.js';
import { readSettings, type Setting } from './file.js';
import { llamaFactoryDefaults, llamaFactoryRank } from './llama-factory.js';
import { splitList } from './rules.js';

/** Options of the trainer without objects of a program: a regular expression is text between slashes. */
export type PlainOptions = Record<string, unknown> & {
  model?: string;
  outputDir?: string;
  dataset?: string | DatasetSpec[];
  evalDataset?: string | number;
};

export interface Configuration {
  options: PlainOptions;
  resume: boolean | string;
  overwrite: boolean;
  exportDir?: string;
  /** Where each option was set, for messages of the trainer. */
  places: ReadonlyMap<string, Entry>;
  /** What to say where the file has another program's defaults. */
  note?: string;
}

/** Flags win over the file. @throws see readSettings and translate */
export async function readConfiguration(path: string | undefined, flags: readonly Setting[]): Promise<Configuration> {
  const file = path === undefined ? [] : await readSettings(path, nestedKeys);
  const { dialect, because } = dialectOf(file);
  const rules = allRules(dialect);
  const draft = merge(translate(file, rules), translate(flags, rules));
  combine(draft, dialect);
  const options: PlainOptions = {};
  for (const [path, { value }] of draft) if (!path.startsWith('@')) setPath(options, path, value);
  await addDatasets(options, draft);
  return {
    options,
    resume: (draft.get('@resume')?.value ?? false) as boolean | string,
    overwrite: draft.get('@overwrite')?.value === true,
    exportDir: draft.get('@exportDir')?.value as string | undefined,
    places: draft,
    note: because && noteOfDefaults(because, draft),
  };
}

/** What a flag sets takes the place of all that the file says of the same thing: of lora where lora is none, too. */
function merge(file: Draft, flags: Draft): Draft {
  const merged: Draft = new Map(file);
  for (const [path, entry] of flags) {
    for (const other of file.keys()) {
      if (other.startsWith(`${path}.`) || path.startsWith(`${other}.`)) merged.delete(other);
    }
    merged.set(path, entry);
  }
  if (flags.has('quantization') || flags.has('quantization.type')) {
    if (!flags.has('@bits')) merged.delete('@bits');
  }
  if (flags.has('@bits') && !flags.has('quantization')) merged.delete('quantization');
  if (flags.has('@bits') && !flags.has('quantization.type')) merged.delete('quantization.type');
  for (const [one, other] of [
    ['maxSteps', 'epochs'],
    ['warmupSteps', 'warmupRatio'],
  ] as const) {
    if (flags.has(one) && !flags.has(other)) merged.delete(other);
    if (flags.has(other) && !flags.has(one)) merged.delete(one);
  }
  return merged;
}

/** Values that several keys make together. */
function combine(draft: Draft, dialect: Dialect): void {
  combineBits(draft, dialect);
  for (const [path, entry] of draft) {
    const [, whole] = [...draft].find(([other]) => path.startsWith(`${other}.`)) ?? [];
    if (whole)
      throw conflict(
        entry.place,
        `'${entry.key}' does not go with '${whole.key}' (${whole.place}), which asks for ${whole.value}`,
      );
  }

  const strategy = draft.get('@evalStrategy');
  const steps = draft.get('@evalSteps');
  if (steps && strategy?.value !== 'no') draft.set('evalSteps', steps);
  if (strategy?.value === 'steps' && !steps) {
    const logging = draft.get('loggingSteps');
    if (!logging) throw conflict(strategy.place, `'${strategy.key}: steps' needs eval_steps`);
    draft.set('evalSteps', logging);
  }
  const dataSeed = draft.get('@dataSeed');
  if (dataSeed && dataSeed.value !== (draft.get('seed')?.value ?? 42)) {
    throw conflict(dataSeed.place, `'${dataSeed.key}' must equal seed: one seed is of everything random`);
  }
  if (dialect === 'llama-factory') addDefaults(draft);
}

/** bits of qlora.py, quantization_bit of LLaMA-Factory. */
function combineBits(draft: Draft, dialect: Dialect): void {
  const bits = draft.get('@bits');
  if (!bits) {
    const says = [...draft.keys()].some((path) => path === 'quantization' || path.startsWith('quantization.'));
    if (dialect === 'llama-factory' && !says) draft.set('quantization', byDefault('none'));
    return;
  }
  const type = draft.get('quantization.type');
  if (bits.value === 4) {
    if (draft.has('quantization'))
      throw conflict(bits.place, `'${bits.key}: 4' and quantization none exclude each other`);
    if (type?.value === 'int8')
      throw conflict(bits.place, `'${bits.key}: 4' and '${type.key}' (${type.place}) exclude each other`);
    draft.set('quantization.type', type ?? { ...bits, value: 'nf4' });
    return;
  }
  // The type and the double quantization of 4 bits say nothing of other bits; qlora.py's scripts always give them.
  for (const path of [...draft.keys()])
    if (path.startsWith('quantization.') && path !== 'quantization.skipModules') draft.delete(path);
  if (bits.value === 8) draft.set('quantization.type', { ...bits, value: 'int8' });
  else {
    draft.delete('quantization.skipModules');
    draft.set('quantization', { ...bits, value: 'none' });
    if (bits.value === 32 && !draft.has('computeDtype')) draft.set('computeDtype', { ...bits, value: 'f32' });
  }
}

const theirDefault = "LLaMA-Factory's default";

function byDefault(value: unknown): Entry {
  return { value, key: 'its default', place: theirDefault };
}

function noteOfDefaults(because: string, draft: Draft): string {
  const defaults = [...draft].flatMap(([path, { place, value }]) => {
    if (place !== theirDefault) return [];
    return path === 'quantization' ? 'base not quantized' : `${path} ${value}`;
  });
  const means = defaults.length > 0 ? `: what it leaves out has LLaMA-Factory's defaults: ${defaults.join(', ')}` : '';
  return `read as a LLaMA-Factory file (because of ${because})${means}`;
}

function addDefaults(draft: Draft): void {
  for (const [path, value] of Object.entries(llamaFactoryDefaults)) {
    if (!draft.has(path)) draft.set(path, byDefault(value));
  }
  if (draft.has('lora') || draft.has('initialAdapter')) return;
  if (!draft.has('lora.r')) draft.set('lora.r', byDefault(llamaFactoryRank));
  if (!draft.has('lora.alpha')) draft.set('lora.alpha', byDefault(2 * (draft.get('lora.r')?.value as number)));
}

async function addDatasets(options: PlainOptions, draft: Draft): Promise<void> {
  const named = draft.get('@datasets');
  const [folder, most] = [draft.get('@datasetDir'), draft.get('@maxSamples')];
  const given = named ?? draft.get('dataset');
  const where = { folder: folder?.value as string | undefined, place: given?.place ?? '' };
  const ofNames = folder ?? most;
  if (ofNames && !named && typeof options.dataset !== 'string') {
    throw conflict(ofNames.place, `'${ofNames.key}' needs dataset, as names or paths`);
  }
  if (named || (typeof options.dataset === 'string' && (ofNames || options.dataset.includes(',')))) {
    options.dataset = await sourcesOf(splitList(given?.value), where, most?.value as number | undefined);
  } else if (Array.isArray(options.dataset)) {
    options.dataset = options.dataset.map((entry) => (typeof entry === 'string' ? { source: entry } : entry));
  }
  const evaluated = draft.get('@evalDatasets');
  if (evaluated) {
    const [first, ...more] = await sourcesOf(evaluated.value as string[], { ...where, place: evaluated.place });
    if (more.length > 0) throw conflict(evaluated.place, `'${evaluated.key}' takes one data set`);
    options.evalDataset = first?.source;
    // The data sets to train on have formats of their own.
    options.datasetFormat ??= first?.format;
  }
}

function setPath(options: Record<string, unknown>, path: string, value: unknown): void {
  const [first, ...rest] = path.split('.') as [string, ...string[]];
  if (rest.length === 0) options[first] = value;
  else {
    options[first] ??= {};
    setPath(options[first] as Record<string, unknown>, rest.join('.'), value);
  }
}

/** With the objects that only a program can write. */
export function trainerOptions(options: PlainOptions): TrainerOptions {
  const { lora } = options as { lora?: unknown };
  const { targetModules } = (lora ?? {}) as { targetModules?: unknown };
  const pattern = typeof targetModules === 'string' ? /^\/(.*)\/$/s.exec(targetModules)?.[1] : undefined;
  if (pattern === undefined) return options as unknown as TrainerOptions;
  return { ...options, lora: { ...(lora as object), targetModules: new RegExp(pattern) } } as unknown as TrainerOptions;
}

/** An error of the library about an option says where that option was set. */
export function locate(error: unknown, places: ReadonlyMap<string, Entry>): unknown {
  if (!(error instanceof QLoRAError)) return error;
  const option = error.detail?.option;
  if (typeof option !== 'string') return error;
  const [path, entry] = [...places].find(([path]) => option === path || option.startsWith(`${path}.`)) ?? [];
  return entry ? atPlace(error, entry, path === option ? 'all' : 'part') : error;
}
