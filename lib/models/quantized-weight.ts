/** Weights to and from a bitsandbytes 4-bit checkpoint. */
import { quantItems, quantTensorNames, readQuantState } from '../io/bnb-checkpoint.js';
import type { ModelFolder } from '../io/model-folder.js';
import type { SafetensorsItem } from '../io/safetensors.js';
import type { FourBitType } from '../ops/quantize.js';
import { Weight, type WeightTensors } from '../ops/weight.js';
import { type Stream, Tensor } from '../tensor.js';

/** The weight of a module as the folder stores it in 4 bits, with the maps of the file; undefined where it does not. */
export async function readQuantizedWeight(
  stream: Stream,
  folder: ModelFolder,
  path: string,
): Promise<Weight | undefined> {
  const state = await readQuantState(folder, path);
  if (!state) return undefined;
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
  const weight = new Weight(N, K, { data, absmax, code, blockSize, type, original, ...nested });
  try {
    await Promise.all(reads);
    return weight;
  } catch (error) {
    await Promise.allSettled(reads);
    weight.dispose();
    throw error;
  }
}

/** The tensors of a 4-bit weight as bitsandbytes writes them. */
export function quantizedItems(path: string, weight: Weight): SafetensorsItem[] {
  const { data, absmax, code, nestedAbsmax, nestedCode, offset, blockSize, type } = weight.tensors;
  const nested = nestedAbsmax ? { blockSize: 256, offset: offset as number } : undefined;
  const state = {
    type: type as FourBitType,
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
