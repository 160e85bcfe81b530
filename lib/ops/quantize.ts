import type { ResolvedQuantizeOptions } from '../quantization.js';
import { type FloatDType, type MemoryClass, type Stream, Tensor } from '../tensor.js';
import { cast } from './elementwise.js';
import { Weight } from './weight.js';

export type FourBitType = 'nf4' | 'fp4';
export type DynamicMapKind = 'signed' | 'unsigned';

/** As the addon numbers them. */
const fourBitTypeIndex: Readonly<Record<FourBitType, number>> = { nf4: 0, fp4: 1 };
const dynamicMapIndex: Readonly<Record<DynamicMapKind, number>> = { signed: 0, unsigned: 1 };

/** Of an 8-bit block: of double quantization and of optimizer state. */
export const dynamicBlockSize = 256;

/** The 16 values of a 4-bit type, f32 [16], by code. Shared: not to be disposed of. */
export function fourBitCode(stream: Stream, type: FourBitType): Tensor {
  return stream.shared(type, () => {
    const code = new Tensor(stream, 'f32', [16], 'weights');
    stream.run('fourBitCode', code, fourBitTypeIndex[type]);
    return code;
  });
}

/** The 256 values of a dynamic 8-bit map, f32 [256], rising. Shared: not to be disposed of. */
export function dynamicMap(stream: Stream, map: DynamicMapKind): Tensor {
  return stream.shared(map, () => {
    const code = new Tensor(stream, 'f32', [256], 'weights');
    stream.run('dynamicMapCode', code, dynamicMapIndex[map]);
    return code;
  });
}

/**
 * 4-bit codes of x, of any float dtype and shape, in blocks of its flat elements.
 *
 * @param blockSize a power of two from 32 to 4096
 * @returns packed u8 [ceil(n / 2)], the even element in the high nibble; absmax f32 [ceil(n / blockSize)]
 * @throws ERR_QLORA_NON_FINITE, by whatever reads the results
 */
export function quantize4bit(
  x: Tensor,
  type: FourBitType,
  blockSize: number,
  absmaxClass: MemoryClass = 'weights',
): { packed: Tensor; absmax: Tensor } {
  const packed = new Tensor(x.stream, 'u8', [Math.ceil(x.size / 2)], 'weights');
  const absmax = new Tensor(x.stream, 'f32', [Math.ceil(x.size / blockSize)], absmaxClass);
  x.stream.run('quantize4bit', x, packed, absmax, fourBitTypeIndex[type], blockSize);
  return { packed, absmax };
}

/**
 * Block maxima in 8 bits: their mean is taken off, the rest rounded to the signed dynamic map in blocks of 256.
 *
 * @param absmax f32 [blocks]
 * @returns index u8 [blocks]; nestedAbsmax f32 [ceil(blocks / 256)]; offset, the mean, f32 [1]
 */
export function doubleQuantize(absmax: Tensor): { index: Tensor; nestedAbsmax: Tensor; offset: Tensor } {
  const { stream, size } = absmax;
  const index = new Tensor(stream, 'u8', [size], 'weights');
  const nestedAbsmax = new Tensor(stream, 'f32', [Math.ceil(size / dynamicBlockSize)], 'weights');
  const offset = new Tensor(stream, 'f32', [1], 'scratch');
  stream.run('doubleQuantize', absmax, index, nestedAbsmax, offset);
  return { index, nestedAbsmax, offset };
}

/** x (f32) rounded to a dynamic map in blocks of 256: index u8, shaped as x, and absmax f32 [ceil(n / 256)]. */
export function quantize8bit(x: Tensor, map: DynamicMapKind): { index: Tensor; absmax: Tensor } {
  const index = new Tensor(x.stream, 'u8', x.shape, x.memoryClass);
  const absmax = new Tensor(x.stream, 'f32', [Math.ceil(x.size / dynamicBlockSize)], x.memoryClass);
  x.stream.run('quantize8bit', x, index, absmax, dynamicMapIndex[map]);
  return { index, absmax };
}

/** What `quantize8bit` made, as f32. */
export function dequantize8bit(index: Tensor, absmax: Tensor, map: DynamicMapKind): Tensor {
  const y = new Tensor(index.stream, 'f32', index.shape, index.memoryClass);
  index.stream.run('dequantize8bit', index, absmax, y, dynamicMapIndex[map]);
  return y;
}

/** LLM.int8's rows of x [N, K], which is rounded to f16 first: q i8 [N, K] and absmax f32 [N] ("SCB"). */
export function quantizeInt8(x: Tensor): { q: Tensor; absmax: Tensor } {
  const q = new Tensor(x.stream, 'i8', x.shape, 'weights');
  const absmax = new Tensor(x.stream, 'f32', [x.dim(0)], 'weights');
  x.stream.run('quantizeInt8', x, q, absmax);
  return { q, absmax };
}

/**
 * A matrix x [N, K] of any float dtype, quantized. x is not needed any more once this has been called.
 *
 * @throws ERR_QLORA_NON_FINITE where x holds a value that is not finite, for int8 in f16
 */
export async function quantizeWeight(x: Tensor, options: ResolvedQuantizeOptions): Promise<Weight> {
  const { type, blockSize, doubleQuant } = options;
  const [N, K] = [x.dim(0), x.dim(1)];
  const original = x.dtype as FloatDType;
  if (type === 'int8') {
    const { q, absmax } = quantizeInt8(x);
    return whole(new Weight(N, K, { data: q, absmax, original }), absmax);
  }
  const code = fourBitCode(x.stream, type);
  const { packed, absmax } = quantize4bit(x, type, blockSize, doubleQuant ? 'scratch' : 'weights');
  if (!doubleQuant) return whole(new Weight(N, K, { data: packed, absmax, code, type, blockSize, original }), absmax);
  const nestedCode = dynamicMap(x.stream, 'signed');
  const { index, nestedAbsmax, offset } = doubleQuantize(absmax);
  absmax.dispose();
  const tensors = { data: packed, absmax: index, code, type, nestedAbsmax, nestedCode, blockSize, original };
  try {
    const [mean] = await offset.read();
    return new Weight(N, K, { ...tensors, offset: mean });
  } catch (error) {
    new Weight(N, K, tensors).dispose();
    throw error;
  } finally {
    offset.dispose();
  }
}

/**
 * x [N, K] in the form that `like` has, without waiting: a value that is not finite is found by whatever reads the
 * result. 4-bit block maxima stay fp32, whatever `like` does. x is not needed any more once this has been called.
 */
export function quantizeLike(x: Tensor, like: Weight): Weight {
  const { N, K, originalDtype: original } = like;
  const { type, blockSize } = like.tensors;
  if (like.isDense) return Weight.dense(cast(undefined, x, original, 'weights'));
  if (!type || !blockSize) {
    const { q, absmax } = quantizeInt8(x);
    return new Weight(N, K, { data: q, absmax, original });
  }
  const { packed, absmax } = quantize4bit(x, type, blockSize);
  return new Weight(N, K, { data: packed, absmax, code: fourBitCode(x.stream, type), type, blockSize, original });
}

/** The weight, once its last part is known to be good. */
async function whole(weight: Weight, last: Tensor): Promise<Weight> {
  try {
    await last.readBits();
    return weight;
  } catch (error) {
    weight.dispose();
    throw error;
  }
}

/** The matrix [N, K] that a weight of any kind stands for, each value rounded once to dtype. */
export function dequantizeWeight(weight: Weight, dtype: FloatDType, memoryClass: MemoryClass = 'activations'): Tensor {
  const y = new Tensor(weight.stream, dtype, [weight.N, weight.K], memoryClass);
  weight.stream.run('dequantize', ...weight.args, y);
  return y;
}
