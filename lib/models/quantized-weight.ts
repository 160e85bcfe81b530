/** Weights to and from a bitsandbytes checkpoint. */
import { quantItems, quantTensorNames, readQuantState } from '../io/bnb-checkpoint.js';
import { int8Items, int8Names, readInt8Shape } from '../io/int8-checkpoint.js';
import type { ModelFolder } from '../io/model-folder.js';
import type { SafetensorsItem } from '../io/safetensors.js';
import { Weight, type WeightTensors } from '../ops/weight.js';
import { type Stream, Tensor } from '../tensor.js';

/** The weight of a module as the folder stores it in 4 bits, with the maps of the file, or in 8; undefined where it does not. */
export async function readQuantizedWeight(
  stream: Stream,
  folder: ModelFolder,
  path: string,
): Promise<Weight | undefined> {
  const state = await readQuantState(folder, path);
  if (!state) return readInt8Weight(stream, folder, path);
  const names = quantTensorNames(path, state.type);
  const [N, K] = state.shape as [number, number];
  const blocks = Math.ceil((N * K) / state.blockSize);
  const make = (dtype: 'u8' | 'f32', size: number) => new Tensor(stream, dtype, [size], 'weights');
  const data = make('u8', Math.ceil((N * K) / 2));
  const code = make('f32', 16);
  const absmax = make(state.nested ? 'u8' : 'f32', blocks);
  const reads = [
    folder.entry(names.packed).file.readBits(names.packed, data),
    folder.read(names.map, code),
    state.nested ? folder.entry(names.absmax).file.read(names.absmax, absmax) : folder.read(names.absmax, absmax),
  ];
  let nested: Partial<WeightTensors> = {};
  if (state.nested) {
    const nestedAbsmax = make('f32', Math.ceil(blocks / state.nested.blockSize));
    const nestedCode = make('f32', 256);
    reads.push(folder.read(names.nestedAbsmax, nestedAbsmax), folder.read(names.nestedMap, nestedCode));
    nested = { nestedAbsmax, nestedCode, offset: state.nested.offset };
  }
  const { blockSize, type, dtype: original } = state;
  const tensors = { data, absmax, code, blockSize, type, original, ...nested };
  // The file's own codes are not those that other weights share.
  return filled(new Weight(N, K, tensors, [data, absmax, code, nested.nestedAbsmax, nested.nestedCode]), reads);
}

async function readInt8Weight(stream: Stream, folder: ModelFolder, path: string): Promise<Weight | undefined> {
  const shape = await readInt8Shape(folder, path);
  if (!shape) return undefined;
  const names = int8Names(path);
  const data = new Tensor(stream, 'i8', shape, 'weights');
  const absmax = new Tensor(stream, 'f32', [shape[0]], 'weights');
  const { torch_dtype, dtype = torch_dtype } = folder.config;
  const original = dtype === 'bfloat16' ? 'bf16' : dtype === 'float32' ? 'f32' : 'f16';
  const reads = [folder.entry(names.data).file.read(names.data, data), folder.read(names.absmax, absmax)];
  return filled(new Weight(...shape, { data, absmax, original }), reads);
}

/** The weight, once what it consists of was read. */
async function filled(weight: Weight, reads: readonly Promise<void>[]): Promise<Weight> {
  try {
    await Promise.all(reads);
    return weight;
  } catch (error) {
    await Promise.allSettled(reads);
    weight.dispose();
    throw error;
  }
}

/** The tensors of a quantized weight as bitsandbytes writes them. */
export function quantizedItems(path: string, weight: Weight): SafetensorsItem[] {
  const { data, absmax, code, nestedAbsmax, nestedCode, offset, blockSize, type } = weight.tensors;
  if (!type) return int8Items(path, data, absmax as Tensor);
  const nested = nestedAbsmax ? { blockSize: 256, offset: offset as number } : undefined;
  const state = {
    type,
    blockSize: blockSize as number,
    dtype: weight.originalDtype,
    shape: [weight.N, weight.K],
    nested,
  };
  return quantItems(path, state, {
    packed: data,
    absmax: absmax as Tensor,
    map: code as Tensor,
    nestedAbsmax,
    nestedMap: nestedCode,
  });
}
