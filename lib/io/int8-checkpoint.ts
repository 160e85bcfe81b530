/** bitsandbytes' 8-bit weights (LLM.int8) inside safetensors, of module P: P.weight i8 [N, K]; P.SCB f32 [N], the rows' maxima; P.weight_format u8, 0 for rows. */
import type { Tensor } from '../tensor.js';
import { bad, type TensorSource } from './bnb-checkpoint.js';
import type { SafetensorsItem } from './safetensors.js';

export const int8Names = (path: string) => ({
  data: `${path}.weight`,
  absmax: `${path}.SCB`,
  format: `${path}.weight_format`,
});

/**
 * [N, K] of the 8-bit weight of module `path`; undefined where it is not in 8 bits. Its tensors agree in their sizes.
 *
 * @throws ERR_QLORA_QUANT_STATE
 */
export async function readInt8Shape(source: TensorSource, path: string): Promise<[number, number] | undefined> {
  const names = int8Names(path);
  const absmax = source.tensors.get(names.absmax);
  if (!absmax) return undefined;
  const data = source.tensors.get(names.data);
  if (data?.fileDType !== 'I8' || data.shape.length !== 2) {
    bad(
      names.data,
      `must be I8 [N, K] beside SCB, ${data ? `is ${data.fileDType} [${data.shape.join(', ')}]` : 'is missing'}`,
    );
  }
  const [N, K] = data.shape as [number, number];
  if (absmax.fileDType !== 'F32' || absmax.shape.reduce((n, d) => n * d, 1) !== N) {
    bad(names.absmax, `must be F32 [${N}], is ${absmax.fileDType} [${absmax.shape.join(', ')}]`);
  }
  const format = source.tensors.get(names.format);
  if (format) {
    const small = format.fileDType === 'U8' && format.end - format.begin === 1;
    const [code] = small ? await format.file.readBytes(names.format) : [];
    if (code !== 0) bad(names.format, `must be 0, weights in rows, is ${code ?? 'no single byte'}`);
  }
  return [N, K];
}

/** The tensors of an 8-bit weight for writeSafetensors: same keys, dtypes and shapes as bitsandbytes'. */
export function int8Items(path: string, data: Tensor, absmax: Tensor): SafetensorsItem[] {
  const names = int8Names(path);
  return [
    { name: names.data, data },
    { name: names.absmax, data: absmax },
    { name: names.format, dtype: 'U8', shape: [], data: new Uint8Array(1) },
  ];
}
