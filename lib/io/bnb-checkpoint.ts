/** bitsandbytes' 4-bit weights inside safetensors, and the quantization_config of its checkpoints. Its 8-bit weights: int8-checkpoint.ts. */
import { QLoRAError } from '../errors.js';
import { type FloatDType, Tensor } from '../tensor.js';
import { isObject, type JsonObject, show } from './json.js';
import { PythonFloat, pythonJson } from './python-json.js';
import type { SafetensorsDType, SafetensorsEntry, SafetensorsFile, SafetensorsItem } from './safetensors.js';

export type QuantType = 'nf4' | 'fp4';

/** How one weight is stored. n = product of `shape`, blocks = ceil(n / blockSize). */
export interface QuantState {
  readonly type: QuantType;
  readonly blockSize: number;
  /** What the weight was before, and dequantizes to in bitsandbytes. */
  readonly dtype: FloatDType;
  /** [N, K] */
  readonly shape: readonly number[];
  /** With double quantization. */
  readonly nested?: { readonly blockSize: number; readonly offset: number };
}

/** The names of a weight's tensors. */
export interface QuantTensorNames {
  /** ceil(n / 2) bytes, u8 or called bf16: read it with readBits. */
  readonly packed: string;
  /** f32 [blocks]; u8 indices with double quantization. */
  readonly absmax: string;
  /** f32 [16] */
  readonly map: string;
  /** f32 [ceil(blocks / 256)] */
  readonly nestedAbsmax: string;
  /** f32 [256] */
  readonly nestedMap: string;
  readonly state: string;
}

export function quantTensorNames(path: string, type: QuantType): QuantTensorNames {
  const packed = `${path}.weight`;
  return {
    packed,
    absmax: `${packed}.absmax`,
    map: `${packed}.quant_map`,
    nestedAbsmax: `${packed}.nested_absmax`,
    nestedMap: `${packed}.nested_quant_map`,
    state: `${packed}.quant_state.bitsandbytes__${type}`,
  };
}

const dtypeNames: Readonly<Record<FloatDType, string>> = { f32: 'float32', bf16: 'bfloat16', f16: 'float16' };

/** A map of tensors by name, each with the file that holds it: a ModelFolder. */
export interface TensorSource {
  readonly tensors: ReadonlyMap<string, SafetensorsEntry & { readonly file: SafetensorsFile }>;
}

/** Whether the weight of module `path` is stored in 4 bits, and how it is called then. */
export function quantTypeOf(source: TensorSource, path: string): QuantType | undefined {
  return (['nf4', 'fp4'] as const).find((type) => source.tensors.has(quantTensorNames(path, type).state));
}

/**
 * How the 4-bit weight of module `path` is stored; undefined where it is not in 4 bits. What is returned agrees with the
 * sizes of all its tensors, so that nothing that reads them can leave them.
 *
 * @throws ERR_QLORA_QUANT_STATE
 */
export async function readQuantState(source: TensorSource, path: string): Promise<QuantState | undefined> {
  const type = quantTypeOf(source, path);
  if (!type) return undefined;
  const names = quantTensorNames(path, type);
  const entry = source.tensors.get(names.state);
  if (entry?.dtype !== 'u8' || entry.end - entry.begin > 65536)
    bad(names.state, 'must be u8 with at most 65,536 bytes');
  const state = parseQuantState(names.state, await entry.file.readBytes(names.state));
  if (state.type !== type) bad(names.state, `says quant_type ${state.type}`);
  checkTensors(source, names, state);
  return state;
}

/** @throws ERR_QLORA_QUANT_STATE; `name` is for messages. */
export function parseQuantState(name: string, json: Uint8Array): QuantState {
  let value: unknown;
  try {
    value = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(json));
  } catch (cause) {
    bad(name, 'is no JSON', cause);
  }
  if (!isObject(value)) bad(name, `must be an object, got ${show(value)}`);
  const { quant_type: type, blocksize: blockSize, dtype: dtypeName, shape } = value;
  if (type !== 'nf4' && type !== 'fp4') bad(name, `has quant_type ${show(type)}, not "nf4" or "fp4"`);
  const dtype = (Object.keys(dtypeNames) as FloatDType[]).find((d) => dtypeNames[d] === dtypeName);
  if (!dtype) bad(name, `has dtype ${show(dtypeName)}, not one of ${Object.values(dtypeNames).join(', ')}`);
  if (!isBlockSize(blockSize)) bad(name, `has blocksize ${show(blockSize)}, not a power of two from 32 to 4096`);
  const isShape = Array.isArray(shape) && shape.length === 2 && shape.every((d) => Number.isSafeInteger(d) && d > 0);
  if (!isShape || !Number.isSafeInteger((shape[0] as number) * (shape[1] as number))) {
    bad(name, `has shape ${show(shape)}, not two positive integers`);
  }
  return { type, blockSize, dtype, shape: shape as number[], nested: parseNested(name, value) };
}

function parseNested(name: string, value: JsonObject): QuantState['nested'] {
  const { nested_blocksize: blockSize, nested_offset: offset, nested_dtype: dtype } = value;
  if (blockSize === undefined && offset === undefined && dtype === undefined) return undefined;
  if (blockSize !== 256) bad(name, `has nested_blocksize ${show(blockSize)}, not 256`);
  if (dtype !== 'float32') bad(name, `has nested_dtype ${show(dtype)}, not "float32"`);
  if (!Number.isFinite(offset)) bad(name, `has nested_offset ${show(offset)}, not a finite number`);
  return { blockSize, offset: offset as number };
}

function isBlockSize(value: unknown): value is number {
  return [32, 64, 128, 256, 512, 1024, 2048, 4096].includes(value as number);
}

function checkTensors(source: TensorSource, names: QuantTensorNames, { shape, blockSize, nested }: QuantState): void {
  const n = (shape[0] as number) * (shape[1] as number);
  const blocks = Math.ceil(n / blockSize);
  const packed = source.tensors.get(names.packed);
  const bytes = Math.ceil(n / 2);
  const text = `shape [${shape.join(', ')}] in blocks of ${blockSize}`;
  if (!packed || packed.end - packed.begin !== bytes) {
    bad(names.packed, `must have ${bytes} bytes for ${text}, has ${packed ? packed.end - packed.begin : 'none'}`);
  }
  const need = (name: string, fileDType: SafetensorsDType, count: number) => {
    const entry = source.tensors.get(name);
    const size = entry?.shape.reduce((a, b) => a * b, 1);
    if (entry?.fileDType === fileDType && size === count) return;
    const got = entry ? `is ${entry.fileDType} [${entry.shape.join(', ')}]` : 'is missing';
    bad(name, `must be ${fileDType} [${count}] for ${text}, ${got}`);
  };
  need(names.absmax, nested ? 'U8' : 'F32', blocks);
  need(names.map, 'F32', 16);
  if (nested) {
    need(names.nestedAbsmax, 'F32', Math.ceil(blocks / nested.blockSize));
    need(names.nestedMap, 'F32', 256);
  }
}

/** @throws ERR_QLORA_QUANT_STATE */
export function bad(name: string, message: string, cause?: unknown): never {
  throw new QLoRAError('ERR_QLORA_QUANT_STATE', `'${name}' ${message}`, {
    hint: 'The checkpoint is damaged, or was written by another version of bitsandbytes: quantize the 16-bit model again.',
    cause,
  });
}

/** The JSON's bytes as bitsandbytes writes them. */
export function quantStateJson({ type, blockSize, dtype, shape, nested }: QuantState): Uint8Array {
  const json = pythonJson({
    quant_type: type,
    blocksize: blockSize,
    dtype: dtypeNames[dtype],
    shape,
    ...(nested && {
      nested_blocksize: nested.blockSize,
      nested_dtype: 'float32',
      nested_offset: new PythonFloat(nested.offset),
    }),
  });
  return new TextEncoder().encode(json);
}

/** What a 4-bit weight is made of: tensors, or typed arrays that hold their elements. */
export interface QuantParts {
  readonly packed: Tensor | Uint8Array;
  readonly absmax: Tensor | Float32Array | Uint8Array;
  readonly map: Tensor | Float32Array;
  readonly nestedAbsmax?: Tensor | Float32Array;
  readonly nestedMap?: Tensor | Float32Array;
}

/** The tensors of a 4-bit weight for writeSafetensors: same keys, dtypes, shapes and JSON as bitsandbytes'. */
export function quantItems(path: string, state: QuantState, parts: QuantParts): SafetensorsItem[] {
  const names = quantTensorNames(path, state.type);
  const flat = (name: string, dtype: SafetensorsDType, data: Tensor | Float32Array | Uint8Array): SafetensorsItem => ({
    name,
    dtype,
    shape: [data instanceof Tensor ? data.size : data.length],
    data,
  });
  const items = [
    {
      ...flat(names.packed, 'U8', parts.packed),
      shape: [Math.ceil((state.shape as [number, number]).reduce((a, b) => a * b) / 2), 1],
    },
    flat(names.absmax, state.nested ? 'U8' : 'F32', parts.absmax),
    flat(names.map, 'F32', parts.map),
    flat(names.state, 'U8', quantStateJson(state)),
  ];
  if (!state.nested) return items;
  if (!parts.nestedAbsmax || !parts.nestedMap) {
    throw new QLoRAError(
      'ERR_QLORA_ARGUMENT',
      `${path}: a weight with double quantization needs nestedAbsmax and nestedMap`,
    );
  }
  return [...items, flat(names.nestedAbsmax, 'F32', parts.nestedAbsmax), flat(names.nestedMap, 'F32', parts.nestedMap)];
}

export interface BnbConfig {
  readonly type: QuantType | 'int8';
  readonly doubleQuant: boolean;
  readonly computeDtype: FloatDType;
  /** Modules left in 16 bits besides output head and embeddings. */
  readonly skipModules: readonly string[];
}

/** `quantization_config` of config.json, as transformers writes it. */
export function bnbConfigJson({ type, doubleQuant, computeDtype, skipModules }: BnbConfig): JsonObject {
  const fourBit = type !== 'int8';
  return {
    _load_in_4bit: fourBit,
    _load_in_8bit: !fourBit,
    bnb_4bit_compute_dtype: fourBit ? dtypeNames[computeDtype] : 'float32',
    bnb_4bit_quant_storage: 'uint8',
    bnb_4bit_quant_type: fourBit ? type : 'fp4',
    bnb_4bit_use_double_quant: doubleQuant,
    llm_int8_enable_fp32_cpu_offload: false,
    llm_int8_has_fp16_weight: false,
    llm_int8_skip_modules: skipModules.length ? skipModules : null,
    llm_int8_threshold: new PythonFloat(6),
    load_in_4bit: fourBit,
    load_in_8bit: !fourBit,
    quant_method: 'bitsandbytes',
  };
}

/**
 * What `quantization_config` of a config.json says; undefined where there is none.
 *
 * @throws ERR_QLORA_QUANTIZATION_UNSUPPORTED for other methods (GPTQ, AWQ, ...)
 */
export function readBnbConfig(config: JsonObject): BnbConfig | undefined {
  const value = config.quantization_config ?? undefined;
  if (value === undefined) return undefined;
  const q = isObject(value) ? value : {};
  if (q.quant_method !== 'bitsandbytes' || (q.load_in_4bit !== true && q.load_in_8bit !== true)) {
    throw new QLoRAError(
      'ERR_QLORA_QUANTIZATION_UNSUPPORTED',
      `config.json: the model is quantized with quant_method ${show(q.quant_method)}; bitsandbytes' 4 and 8 bits are supported`,
      {
        hint: 'Use the 16-bit model: it is quantized while it is loaded.',
      },
    );
  }
  const compute = (Object.keys(dtypeNames) as FloatDType[]).find((d) => dtypeNames[d] === q.bnb_4bit_compute_dtype);
  const skip = q.llm_int8_skip_modules;
  return {
    type: q.load_in_4bit !== true ? 'int8' : q.bnb_4bit_quant_type === 'nf4' ? 'nf4' : 'fp4',
    doubleQuant: q.bnb_4bit_use_double_quant === true,
    computeDtype: compute ?? 'f32',
    skipModules: Array.isArray(skip) ? skip.filter((s): s is string => typeof s === 'string') : [],
  };
}
