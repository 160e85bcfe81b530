import { QLoRAError } from '../errors.js';
import { removeTemporaryFiles } from '../io/atomic-file.js';
import { replaceFiles } from '../io/atomic-folder.js';
import { makeFolder } from '../io/folder.js';
import {
  type AdapterConfig,
  adapterConfigName,
  adapterKey,
  adapterWeightsPath,
  openAdapterWeights,
  readAdapterConfig,
  writeAdapterConfig,
} from '../io/peft.js';
import { adaptedModules } from '../io/peft-targets.js';
import { type SafetensorsFile, type SafetensorsItem, writeSafetensors } from '../io/safetensors.js';
import {
  readTrainingRecord,
  type TrainingRecord,
  trainingRecordName,
  writeTrainingRecord,
} from '../io/training-record.js';
import type { Linear } from '../nn/linear.js';
import { LoraLinear } from '../nn/lora.js';
import { Tensor } from '../tensor.js';
import type { ModelCore } from './core.js';
import { doubled, originalWeight, refuseWithDora, restorePrincipal } from './pissa.js';
import { copyModules, type WholeModules, wholePaths } from './whole-modules.js';

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
  /**
   * Modules trained whole and saved with the adapter, in fp32: those whose path ends with one of these names, e.g.
   * embed_tokens, lm_head. Default: none.
   */
  modulesToSave?: string[];
  /**
   * 'pissa' starts A and B from the largest singular values of the weight, and the adapter holds what is left of it, in
   * the form that the base has: so much memory more. The base stays as it is. save() writes a plain adapter of rank 2 r
   * over the original weights. Default: A random, B zero.
   */
  init?: 'default' | 'pissa';
  /** Of A's random start; default 42. */
  seed?: number;
}

/** An adapter over a model: a low-rank change of each layer that it targets. */
export class LoraAdapter {
  /** @internal How it was trained, where that is known: which template its prompts go through. */
  training: TrainingRecord | undefined;

  /** @internal */
  constructor(
    readonly name: string,
    readonly layers: readonly LoraLinear[],
    /** @internal */
    readonly whole: WholeModules,
    private readonly config: AdapterConfig,
  ) {}

  /** Of all its layers, and of the modules that are trained whole. */
  get trainableParameters(): number {
    return this.parameters.reduce((sum, t) => sum + t.size, 0);
  }

  /** @internal What is trained, in the order of the layers, then the modules that are trained whole. */
  get parameters(): Tensor[] {
    return [...this.namedParameters.values()];
  }

  /** @internal The same by their names in PEFT's files. */
  get namedParameters(): Map<string, Tensor> {
    return new Map([...partsOf(this)].map(({ key, tensor }) => [key, tensor]));
  }

  /** Writes a PEFT folder: adapter_config.json and adapter_model.safetensors. It is seen whole, or as it was before. */
  async save(directory: string): Promise<void> {
    await makeFolder(directory);
    await removeTemporaryFiles(directory);
    await replaceFiles(directory, adapterConfigName, [trainingRecordName], (folder) => this.write(folder));
  }

  /** @internal Takes the values that write() wrote, bit for bit. */
  async restore(folder: string): Promise<void> {
    using file = await openAdapterWeights(folder);
    const layers = this.layers.filter(({ start }) => start);
    const principal = new Set(layers.flatMap(({ A, B }) => [A, B]));
    for (const { key, tensor } of partsOf(this)) {
      // Of PiSSA's A and B the file holds more than is trained.
      if (!principal.has(tensor)) await file.readFinite(key, tensor);
    }
    for (const layer of layers) {
      await restorePrincipal(file, { A: adapterKey(layer.path, 'A'), B: adapterKey(layer.path, 'B') }, layer);
    }
  }

  /** @internal The files of save(), into a folder that nobody reads yet. */
  async write(folder: string): Promise<void> {
    const own = new Set(this.parameters);
    const items: Promise<SafetensorsItem>[] = [];
    for (const { key: name, tensor } of partsOf(this, (layer) => layer.overWhole())) {
      if (own.has(tensor)) items.push(Promise.resolve({ name, data: tensor }));
      else {
        // Made for the file alone: on the stream it is freed before the next is made.
        const { shape } = tensor;
        items.push(tensor.read().then((data) => ({ name, dtype: 'F32', shape, data })));
        tensor.dispose();
      }
    }
    await writeSafetensors(adapterWeightsPath(folder), await Promise.all(items), { format: 'pt' });
    if (this.training) await writeTrainingRecord(folder, this.training);
    const principal = this.layers.some(({ start }) => start);
    await writeAdapterConfig(folder, principal ? doubled(this.config) : this.config);
  }

  /** @internal */
  dispose(): void {
    for (const layer of this.layers) layer.dispose();
    for (const tensor of this.whole.tensors.values()) tensor.dispose();
  }
}

/**
 * All tensors of an adapter with their names in PEFT's files.
 *
 * @param factors A and B of a layer; default: its own
 */
function* partsOf(
  { layers, whole }: LoraAdapter,
  factors: (layer: LoraLinear) => { A: Tensor; B: Tensor } = (layer) => layer,
): Generator<{ key: string; tensor: Tensor }> {
  for (const layer of layers) {
    const { path, magnitude } = layer;
    const { A, B } = factors(layer);
    yield { key: adapterKey(path, 'A'), tensor: A };
    yield { key: adapterKey(path, 'B'), tensor: B };
    if (magnitude) yield { key: adapterKey(path, 'magnitude'), tensor: magnitude };
  }
  for (const [name, tensor] of whole.tensors) yield { key: adapterKey(name, 'whole'), tensor };
}

/** What an adapter's folder says of such options. @param linears paths of the layers that an adapter can change */
export function adapterConfig(options: LoraOptions, baseModel: string, linears: readonly string[]): AdapterConfig {
  const { targetModules = 'all-linear' } = options;
  return {
    baseModel,
    r: options.r ?? 64,
    alpha: options.alpha ?? 16,
    dropout: options.dropout ?? 0,
    targetModules: targetModules instanceof RegExp ? targetModules.source : namesOf(linears, targetModules),
    layersToTransform: [],
    layersPattern: [],
    rankPattern: options.rankPattern ?? {},
    alphaPattern: options.alphaPattern ?? {},
    modulesToSave: options.modulesToSave ?? [],
    useRslora: options.useRslora ?? false,
    useDora: options.useDora ?? false,
  };
}

/** A new adapter with PEFT's start: A random, B zero, so that the model computes what it did; or PiSSA's. */
export function createAdapter(core: ModelCore, name: string, options: LoraOptions): LoraAdapter {
  const { seed = 42 } = options;
  const config = adapterConfig(options, core.name, linearPaths(core));
  refuseTaken(core, name);
  if (options.init === 'pissa') refuseWithDora(options.useDora);
  const adapter = makeAdapter(core, name, config);
  const byPath = linearsByPath(core);
  try {
    for (const layer of adapter.layers) {
      const linear = byPath.get(layer.path) as Linear;
      if (options.init !== 'pissa') {
        layer.initialize(linear, core.computeDtype, seed, linear.index);
        continue;
      }
      using original = originalWeight(core, linear);
      layer.initializePrincipal(original, linear, seed);
    }
    publish(core, adapter);
    return adapter;
  } catch (error) {
    adapter.dispose();
    throw error;
  }
}

/** PEFT knows 'all-linear', but in files it writes the names. */
function namesOf(linears: readonly string[], targets: 'all-linear' | readonly string[]): readonly string[] {
  if (targets !== 'all-linear') return targets;
  return [...new Set(linears.map((path) => path.slice(path.lastIndexOf('.') + 1)))];
}

/** An adapter from a PEFT folder. */
export async function loadAdapter(core: ModelCore, name: string, directory: string): Promise<LoraAdapter> {
  const config = await readAdapterConfig(directory);
  refuseTaken(core, name);
  using file = await openAdapterWeights(directory);
  const adapter = makeAdapter(core, name, config);
  try {
    const unread = new Set(file.tensors.keys());
    for (const { key, tensor } of partsOf(adapter)) {
      checkAdapterShape(directory, key, file.entry(key).shape, tensor.shape);
      unread.delete(key);
      await readAsF32(file, key, tensor);
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
    // Only now, whole, does it become one that calls can choose.
    publish(core, adapter);
    return adapter;
  } catch (error) {
    adapter.dispose();
    throw error;
  }
}

/** Takes the adapter off its layers and frees it. */
export function detach(core: ModelCore, adapter: LoraAdapter): void {
  core.adapters.delete(adapter.name);
  for (const linear of core.weights.linears) linear.adapters.delete(adapter.name);
  adapter.dispose();
}

function refuseTaken(core: ModelCore, name: string): void {
  if (!core.adapters.has(name)) return;
  throw new QLoRAError('ERR_QLORA_ADAPTER_EXISTS', `an adapter named '${name}' is loaded already`, {
    hint: 'Choose another name, or removeLora() the first.',
  });
}

/** An adapter whose tensors are still to be filled, and that no call can choose yet. */
function makeAdapter(core: ModelCore, name: string, config: AdapterConfig): LoraAdapter {
  const byPath = linearsByPath(core);
  const { dropout, useRslora, useDora } = config;
  // What is trained whole gets no low-rank change beside it, as in PEFT.
  const whole = new Set(wholePaths(core, config.modulesToSave));
  const layers = adaptedModules(config, [...byPath.keys()])
    .filter(({ path }) => !whole.has(path))
    .map(({ path, r, alpha }) => {
      const linear = byPath.get(path) as Linear;
      return new LoraLinear(core.stream, linear, { r, alpha, dropout, useRslora, useDora });
    });
  return new LoraAdapter(name, layers, copyModules(core, [...whole]), config);
}

function publish(core: ModelCore, adapter: LoraAdapter): void {
  refuseTaken(core, adapter.name);
  const byPath = linearsByPath(core);
  for (const layer of adapter.layers) byPath.get(layer.path)?.adapters.set(adapter.name, layer);
  core.adapters.set(adapter.name, adapter);
}

export const linearPaths = (core: ModelCore) => core.weights.linears.map(({ path }) => path);
const linearsByPath = (core: ModelCore) => new Map(core.weights.linears.map((linear) => [linear.path, linear]));

function checkAdapterShape(directory: string, name: string, got: readonly number[], expected: readonly number[]): void {
  if (got.length === expected.length && got.every((n, i) => n === expected[i])) return;
  throw new QLoRAError(
    'ERR_QLORA_SHAPE',
    `${directory}: '${name}' must have shape [${expected.join(', ')}] for this model, got [${got.join(', ')}]`,
    { hint: 'The adapter was trained over a model of another size.', detail: { name, expected, got } },
  );
}

/** Adapters come in f32, bf16 or f16; here they are f32. */
async function readAsF32(file: SafetensorsFile, name: string, tensor: Tensor): Promise<void> {
  const { dtype } = file.entry(name);
  if (dtype === 'f32' || (dtype !== 'bf16' && dtype !== 'f16')) return file.readFinite(name, tensor);
  using narrow = new Tensor(tensor.stream, dtype, tensor.shape, 'adapters');
  const done = file.readFinite(name, narrow);
  tensor.stream.run('cast', narrow, tensor);
  await done;
}
