import { Linear } from '../nn/linear.js';
import { zeros } from '../ops/elementwise.js';
import { Weight } from '../ops/weight.js';
import { type Stream, Tensor } from '../tensor.js';
import type { ModelCore } from './core.js';

/** The model on another stream, its tensors of the same shapes, without adapters. */
export function emptyCopy(core: ModelCore, stream: Stream): ModelCore {
  const copies = new Map<unknown, unknown>();
  const copy = <T>(value: T): T => {
    if (typeof value !== 'object' || value === null) return value;
    if (!copies.has(value)) copies.set(value, make(value));
    return copies.get(value) as T;
  };
  const make = (value: object): unknown => {
    if (value instanceof Tensor) return zeros(stream, value.shape, value.dtype, value.memoryClass);
    if (value instanceof Weight) return new Weight(value.N, value.K, copy(value.tensors));
    if (value instanceof Linear) return new Linear(value.path, value.index, copy(value.weight), copy(value.bias));
    if (value instanceof Map) return new Map([...value].map(([key, item]) => [key, copy(item)]));
    if (Array.isArray(value)) return value.map(copy);
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, copy(item)]));
  };
  return { ...core, stream, weights: copy(core.weights), adapters: new Map() };
}
