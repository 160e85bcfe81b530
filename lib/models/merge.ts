/** An adapter merged into 16-bit weights: a Hugging Face model folder that needs neither the adapter nor this library. */

import { join } from 'node:path';
import { setImmediate } from 'node:timers/promises';
import { writeFileAtomic } from '../io/atomic-file.js';
import { writeNewFolder } from '../io/new-folder.js';
import { pythonJson } from '../io/python-json.js';
import { type LazyTensor, writeModelTensors } from '../io/safetensors-stream.js';
import type { Linear } from '../nn/linear.js';
import type { LoraLinear } from '../nn/lora.js';
import { loraRowNorm } from '../ops/dora.js';
import { cast } from '../ops/elementwise.js';
import { addProduct } from '../ops/low-rank.js';
import { dequantizeWeight } from '../ops/quantize.js';
import { type FloatDType, Tensor } from '../tensor.js';
import { copyCompanions, type Manners, writeManners } from './companions.js';
import { decoderOf, type ModelCore } from './core.js';
import { type Drift, measureDrift } from './merge-drift.js';

export interface MergeOptions {
  /** Name of the adapter; undefined: the base alone. */
  adapter: string | undefined;
  manners: Manners;
  signal?: AbortSignal;
  /** Most bytes of a file; default 5 GB, as transformers has it. */
  shardBytes?: number;
}

/** Writes the folder, loads it again without quantization, and compares. */
export async function mergeModel(
  core: ModelCore,
  directory: string,
  { adapter, manners, signal, shardBytes = 5e9 }: MergeOptions,
): Promise<Drift> {
  return writeNewFolder(directory, async (folder) => {
    signal?.throwIfAborted();
    await writeModelTensors(folder, mergedTensors(core, adapter), { shardBytes, signal });
    await writeFileAtomic(join(folder, 'config.json'), `${pythonJson(mergedConfig(core, adapter), 2)}\n`);
    await copyCompanions(core, folder);
    await writeManners(core, folder, manners);
    return measureDrift(core, adapter, folder, signal);
  });
}

/** The tensors that the adapter trained whole, and those that this takes a second copy of, by their names. */
function wholeTensors(core: ModelCore, adapter: string | undefined): Map<string, Tensor> {
  const tensors = new Map(adapter === undefined ? undefined : core.adapters.get(adapter)?.whole.tensors);
  // Trained apart, a head and an embedding are no longer one.
  if (separates(core, adapter)) {
    const { places, decoder } = core.weights;
    for (const [path, place] of places) {
      const name = `${path}.weight`;
      if (place === 'head' && !tensors.has(name)) tensors.set(name, decoder.head.tensors.data);
    }
  }
  return tensors;
}

/** Whether the adapter trained a head or an embedding that share one matrix in the model. */
function separates(core: ModelCore, adapter: string | undefined): boolean {
  const { head, embedding } = decoderOf(core, adapter);
  return core.config.tiedHead && head.tensors.data !== embedding;
}

/** config.json without quantization_config. */
function mergedConfig(core: ModelCore, adapter: string | undefined): Record<string, unknown> {
  const { quantization_config: _, ...config } = core.configJson;
  const names = { f32: 'float32', bf16: 'bfloat16', f16: 'float16' };
  const tied = separates(core, adapter) ? { tie_word_embeddings: false } : {};
  return {
    ...config,
    ...tied,
    ['dtype' in config ? 'dtype' : 'torch_dtype']: names[(core.weights.linears[0] as Linear).weight.originalDtype],
  };
}

/** Every tensor of the merged model, in the order of names, each in the dtype that its file had. */
function mergedTensors(core: ModelCore, adapter: string | undefined): LazyTensor[] {
  const tensors = new Map<string, LazyTensor>();
  for (const [name, tensor] of core.weights.dense) {
    const dtype = tensor.dtype as FloatDType;
    // A view, since what is written is disposed of.
    tensors.set(name, { name, dtype, shape: tensor.shape, make: async () => tensor.view(tensor.shape) });
  }
  for (const linear of core.weights.linears) {
    const { weight, path } = linear;
    const lora = adapter === undefined ? undefined : linear.adapters.get(adapter);
    if (weight.isDense && !lora) continue;
    const name = `${path}.weight`;
    const dtype = weight.originalDtype;
    const make = async () => {
      using merged = await mergedWeight(linear, lora);
      return cast(undefined, merged, dtype);
    };
    tensors.set(name, { name, dtype, shape: [weight.N, weight.K], make });
  }
  for (const [name, whole] of wholeTensors(core, adapter)) {
    const dtype = tensors.get(name)?.dtype ?? (core.weights.decoder.embedding.dtype as FloatDType);
    tensors.set(name, { name, dtype, shape: whole.shape, make: async () => cast(undefined, whole, dtype) });
  }
  return [...tensors.values()].sort((a, b) => (a.name < b.name ? -1 : 1));
}

/** W + scale * B A, with DoRA its rows at their trained lengths, f32 [N, K]. Computed in fp32. */
async function mergedWeight(linear: Linear, lora: LoraLinear | undefined): Promise<Tensor> {
  const weight = lora?.residual ?? linear.weight;
  const merged = dequantizeWeight(weight, 'f32');
  if (!lora) return merged;
  const { A, B, scale, magnitude } = lora;
  addProduct(merged, B, A, scale);
  if (!magnitude) return merged;
  using norm = loraRowNorm(weight, A, B, scale, 'f32');
  const [lengths, norms] = await Promise.all([magnitude.read(), norm.read()]);
  const values = await merged.read();
  merged.dispose();
  await scaleRows(values, lengths, norms);
  return Tensor.from(norm.stream, values, [weight.N, weight.K]);
}

/** Multiplies row n of `values` by lengths[n] / norms[n], some at a time, so that the event loop stays free. */
async function scaleRows(values: Float32Array, lengths: Float32Array, norms: Float32Array): Promise<void> {
  const K = values.length / lengths.length;
  let sinceTurn = 0;
  for (let n = 0; n < lengths.length; n++) {
    const factor = (lengths[n] as number) / (norms[n] as number);
    for (let i = n * K; i < (n + 1) * K; i++) values[i] = (values[i] as number) * factor;
    sinceTurn += K;
    if (sinceTurn < 2 ** 18) continue;
    sinceTurn = 0;
    await setImmediate();
  }
}
