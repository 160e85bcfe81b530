/** Modules that an adapter trains whole, PEFT's modules_to_save: fp32 copies that only this adapter uses. */
import { QLoRAError } from '../errors.js';
import { Linear } from '../nn/linear.js';
import { cast } from '../ops/elementwise.js';
import { dequantizeWeight } from '../ops/quantize.js';
import { Weight } from '../ops/weight.js';
import { Tensor } from '../tensor.js';
import type { ModelCore } from './core.js';
import type { DecoderWeights } from './decoder.js';
import { assemble } from './weights.js';

export interface WholeModules {
  /** Their parameters, f32, by the names that the model's files have. */
  readonly tensors: ReadonlyMap<string, Tensor>;
  /** The model's weights with these in place of its own; the model's where there are none. */
  readonly decoder: DecoderWeights;
}

/**
 * The paths of the modules whose path ends with one of the names, at a dot or not, as PEFT matches them: 'norm' is every
 * norm.
 *
 * @throws ERR_QLORA_ADAPTER_TARGETS where a name fits none
 */
export function wholePaths(core: ModelCore, names: readonly string[]): string[] {
  const paths = [...core.weights.places.keys()];
  const missing = names.find((name) => !paths.some((path) => path.endsWith(name)));
  if (missing === undefined) return paths.filter((path) => names.some((name) => path.endsWith(name)));
  const known = [...new Set(paths.map((path) => path.slice(path.lastIndexOf('.') + 1)))];
  throw new QLoRAError('ERR_QLORA_ADAPTER_TARGETS', `modulesToSave: no module of the model is named by '${missing}'`, {
    hint: `The model has ${known.join(', ')}.`,
  });
}

/**
 * Copies the modules. A head that shares the embedding's matrix is a module of its own here, and training either copy
 * leaves the other as it is: that is what PEFT does unless it is told otherwise.
 */
export function copyModules(core: ModelCore, paths: readonly string[]): WholeModules {
  const { weights, config } = core;
  if (paths.length === 0) return { tensors: new Map(), decoder: weights.decoder };
  const tensors = new Map<string, Tensor>();
  const keep = (name: string, copy: Tensor) => {
    tensors.set(name, copy);
    return copy;
  };
  const modules = new Map(weights.modules);
  for (const path of paths) {
    const place = weights.places.get(path) as string;
    const module = weights.modules.get(place) as Tensor | Linear;
    if (module instanceof Tensor) {
      modules.set(place, keep(`${path}.weight`, cast(undefined, module, 'f32', 'adapters')));
      continue;
    }
    const weight = keep(`${path}.weight`, dequantizeWeight(module.weight, 'f32', 'adapters'));
    const bias = module.bias && keep(`${path}.bias`, cast(undefined, module.bias, 'f32', 'adapters'));
    modules.set(place, new Linear(path, module.index, Weight.dense(weight), bias));
  }
  return { tensors, decoder: assemble(config, modules) };
}
