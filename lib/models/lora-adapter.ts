import { QLoRAError } from '../errors.js';
import { type AdapterConfig, adapterKeys, readAdapterConfig, writeAdapterFiles } from '../io/peft.js';
import { openSafetensors } from '../io/safetensors.js';
import { readTrainingRecord, type TrainingRecord, writeTrainingRecord } from '../io/training-record.js';
import type { Linear } from '../nn/linear.js';
import { LoraLinear } from '../nn/lora.js';
import { Tensor } from '../tensor.js';
import type { ModelCore } from './core.js';

/** What addLora() takes; a loaded PEFT folder brings its own. */
export interface LoraOptions {
  /** Rank; default 64. */
  r?: number;
  /** The change is scaled by alpha / r; default 16. */
  alpha?: number;
  /** Share of the adapter's input that is dropped while training; default 0. */
  dropout?: number;
  /** Names end a module path at a dot, as PEFT matches them; a RegExp must match a whole path. Default 'all-linear'. */
  targetModules?: 'all-linear' | RegExp | string[];
  /** Rank and alpha of the modules whose path a key (a name or a regular expression) ends. */
  rankPattern?: Record<string, number>;
  alphaPattern?: Record<string, number>;
  /** Scale by alpha / sqrt(r). */
  useRslora?: boolean;
  /** Train the rows' lengths apart from their directions. */
  useDora?: boolean;
  /** Of A's random start; default 42. */
  seed?: number;
}

/** An adapter over a model: a low-rank change of each layer that it targets. */
export class LoraAdapter {
  /** How it was trained, where that is known: which template its prompts go through. */
  training: TrainingRecord | undefined;

  constructor(
    readonly name: string,
    readonly layers: readonly LoraLinear[],
    private readonly config: AdapterConfig,
  ) {}

  /** Of all its layers. */
  get trainableParameters(): number {
    return this.parameters.reduce((sum, t) => sum + t.size, 0);
  }

  /** What is trained, in the order of the layers. */
  get parameters(): Tensor[] {
    return this.layers.flatMap((layer) => layer.parameters);
  }

  /** Writes a PEFT folder: adapter_config.json and adapter_model.safetensors. */
  async save(directory: string): Promise<void> {
    const items = this.layers.flatMap((layer) => {
      const keys = adapterKeys(layer.path);
      const item = (name: string, tensor: Tensor) => ({ name, data: tensor });
      return [
        item(keys.A, layer.A),
        item(keys.B, layer.B),
        ...(layer.magnitude ? [item(keys.magnitude, layer.magnitude)] : []),
      ];
    });
    await writeAdapterFiles(directory, this.config, items);
    if (this.training) await writeTrainingRecord(directory, this.training);
  }
}

/** A new adapter with PEFT's start: A random, B zero, so that the model computes what it did. */
export function createAdapter(core: ModelCore, name: string, options: LoraOptions): LoraAdapter {
  const { targetModules = 'all-linear', seed = 42 } = options;
  const targets = core.weights.linears.filter((linear) => matchesTarget(linear.path, targetModules));
  if (targets.length === 0) throw noTargets(core, targetModules);
  const config: AdapterConfig = {
    baseModel: core.directory,
    r: options.r ?? 64,
    alpha: options.alpha ?? 16,
    dropout: options.dropout ?? 0,
    targetModules:
      targetModules instanceof RegExp
        ? targetModules.source
        : [...new Set(targets.map((t) => (targetModules === 'all-linear' ? lastName(t.path) : matchedName(t.path, targetModules))))].sort(),
    rankPattern: options.rankPattern ?? {},
    alphaPattern: options.alphaPattern ?? {},
    useRslora: options.useRslora ?? false,
    useDora: options.useDora ?? false,
  };
  return attach(core, name, config, targets, (layer, linear) =>
    layer.initialize(linear, core.computeDtype, seed, linear.index),
  );
}

/** An adapter from a PEFT folder. */
export async function loadAdapter(core: ModelCore, name: string, directory: string): Promise<LoraAdapter> {
  const config = await readAdapterConfig(directory);
  const { targetModules, layersToTransform } = config;
  const pattern = typeof targetModules === 'string' && targetModules !== 'all-linear' ? new RegExp(targetModules) : targetModules;
  const targets = core.weights.linears.filter(
    (linear) =>
      matchesTarget(linear.path, pattern as Exclude<LoraOptions['targetModules'], undefined>) &&
      (!layersToTransform || layersToTransform.includes(layerNumber(linear.path))),
  );
  if (targets.length === 0) throw noTargets(core, pattern);
  using file = await openSafetensors(`${directory}/adapter_model.safetensors`);
  const unread = new Set(file.tensors.keys());
  const reads: { name: string; tensor: Tensor }[] = [];
  const adapter = attach(core, name, config, targets, (layer) => {
    const keys = adapterKeys(layer.path);
    reads.push({ name: keys.A, tensor: layer.A }, { name: keys.B, tensor: layer.B });
    if (layer.magnitude) reads.push({ name: keys.magnitude, tensor: layer.magnitude });
  });
  try {
    for (const read of reads) {
      const entry = file.entry(read.name);
      checkAdapterShape(directory, read.name, entry.shape, read.tensor.shape);
      unread.delete(read.name);
      await readAsF32(file, read.name, read.tensor);
    }
    const [left] = unread;
    if (left !== undefined) {
      throw new QLoRAError(
        'ERR_QLORA_ADAPTER_INVALID',
        `${directory}: the adapter holds '${left}', which belongs to no layer that it targets in this model`,
        { hint: 'It was trained over another model, or with a method that this library does not know.' },
      );
    }
    adapter.training = await readTrainingRecord(directory);
    return adapter;
  } catch (error) {
    detach(core, adapter);
    throw error;
  }
}

/** Takes the adapter off its layers and frees it. */
export function detach(core: ModelCore, adapter: LoraAdapter): void {
  core.adapters.delete(adapter.name);
  for (const linear of core.weights.linears) {
    linear.adapters.get(adapter.name)?.dispose();
    linear.adapters.delete(adapter.name);
  }
}

function attach(
  core: ModelCore,
  name: string,
  config: AdapterConfig,
  targets: readonly Linear[],
  fill: (layer: LoraLinear, linear: Linear) => void,
): LoraAdapter {
  if (core.adapters.has(name)) {
    throw new QLoRAError('ERR_QLORA_ADAPTER_EXISTS', `an adapter named '${name}' is loaded already`, {
      hint: 'Choose another name, or removeLora() the first.',
    });
  }
  const layers = targets.map((linear) => {
    const layer = new LoraLinear(core.stream, linear, {
      r: patternValue(config.rankPattern, linear.path) ?? config.r,
      alpha: patternValue(config.alphaPattern, linear.path) ?? config.alpha,
      dropout: config.dropout,
      useRslora: config.useRslora,
      useDora: config.useDora,
    });
    linear.adapters.set(name, layer);
    fill(layer, linear);
    return layer;
  });
  const adapter = new LoraAdapter(name, layers, config);
  core.adapters.set(name, adapter);
  return adapter;
}

const lastName = (path: string) => path.slice(path.lastIndexOf('.') + 1);
const endsAtDot = (path: string, name: string) => path === name || path.endsWith(`.${name}`);
const matchedName = (path: string, names: readonly string[]) => names.find((name) => endsAtDot(path, name)) as string;

function matchesTarget(path: string, targets: 'all-linear' | RegExp | readonly string[]): boolean {
  if (targets === 'all-linear') return true;
  if (targets instanceof RegExp) return new RegExp(`^(?:${targets.source})$`, targets.flags.replace(/[gy]/g, '')).test(path);
  return targets.some((name) => endsAtDot(path, name));
}

/** The value of the first key that ends the path at a dot, keys being regular expressions. */
function patternValue(pattern: Readonly<Record<string, number>>, path: string): number | undefined {
  const key = Object.keys(pattern).find((k) => new RegExp(`^(?:.*\\.)?(?:${k})$`).test(path));
  return key === undefined ? undefined : pattern[key];
}

/** The number in a path such as model.layers.3.mlp.up_proj; -1 where there is none. */
function layerNumber(path: string): number {
  return Number(path.match(/\.(\d+)\./)?.[1] ?? -1);
}

function checkAdapterShape(directory: string, name: string, got: readonly number[], expected: readonly number[]): void {
  if (got.length === expected.length && got.every((n, i) => n === expected[i])) return;
  throw new QLoRAError(
    'ERR_QLORA_SHAPE',
    `${directory}: '${name}' must have shape [${expected.join(', ')}] for this model, got [${got.join(', ')}]`,
    { hint: 'The adapter was trained over a model of another size.', detail: { name, expected, got } },
  );
}

/** Adapters come in f32, bf16 or f16; here they are f32. */
async function readAsF32(
  file: Awaited<ReturnType<typeof openSafetensors>>,
  name: string,
  tensor: Tensor,
): Promise<void> {
  const { dtype } = file.entry(name);
  if (dtype === 'f32' || (dtype !== 'bf16' && dtype !== 'f16')) return file.readFinite(name, tensor);
  using narrow = new Tensor(tensor.stream, dtype, tensor.shape, 'adapters');
  const done = file.readFinite(name, narrow);
  tensor.stream.run('cast', narrow, tensor);
  await done;
}

function noTargets(core: ModelCore, targets: unknown): QLoRAError {
  const names = [...new Set(core.weights.linears.map((l) => lastName(l.path)))];
  return new QLoRAError('ERR_QLORA_TARGET_MODULES', `targetModules matches no linear layer of this model: ${String(targets)}`, {
    hint: `Its layers are named ${names.join(', ')}.`,
    detail: { targets: String(targets), known: names },
  });
}
