import { z } from 'zod';
import { chooseDevice } from './devices.js';
import { QLoRAError } from './errors.js';
import { generateTexts } from './generate/batch.js';
import { mannersOf } from './generate/manners.js';
import { chooseAdapter, type GenerateOptions } from './generate/options.js';
import { type TextStream, type TokenStream, textStream, tokenStream } from './generate/streams.js';
import { locate } from './io/hub.js';
import { log } from './logger.js';
import { checkIds, decoderOf, hiddenStates, logitsOf, type ModelCore } from './models/core.js';
import { disposeCore, loadCore } from './models/load.js';
import { createAdapter, detach, type LoraAdapter, type LoraOptions, loadAdapter } from './models/lora-adapter.js';
import { mergeModel } from './models/merge.js';
import { driftSentence, isRounding } from './models/merge-drift.js';
import { saveModel } from './models/save.js';
import type { WeightOptions } from './models/weights.js';
import { linearCrossEntropy } from './ops/linear-cross-entropy.js';
import { checkOptions } from './options.js';
import { type QuantizeOptions, resolveQuantizeOptions, typeByName } from './quantization.js';
import { type Device, type FloatDType, Tensor } from './tensor.js';

export interface LoadOptions {
  /** 'none' keeps the dtype of the file. A checkpoint that is quantized already keeps its own. Default nf4 with double quantization. */
  quantization?: (QuantizeOptions & { skipModules?: string[] }) | 'none';
  /** What is computed in; 'f32' is IEEE fp32. Default bf16. */
  computeDtype?: FloatDType;
  /** Default 'auto': CUDA's first device where it can be used, else the CPU. 'cuda:N' is never another. */
  device?: Device | 'auto';
  /** Fields of config.json, also inside rope_scaling, that the library does not know but may ignore. Unknown fields are an error unless null or false. */
  allowUnknownConfig?: string[];
  /** Of a model named `owner/name`, and of its adapters: use what the cache holds, and ask no hub. Default: whether HF_HUB_OFFLINE is set. */
  offline?: boolean;
  /** Of a model named `owner/name`: branch, tag or commit. Default 'main'. */
  revision?: string;
  signal?: AbortSignal;
  /** `phase` is 'download' (bytes) or 'load' (modules). */
  onProgress?(p: { phase: string; done: number; total: number }): void;
}

export interface ChatMessage {
  role: 'system' | 'user' | 'assistant' | 'tool';
  content: string;
}

/**
 * Which adapter a call uses. Left out: the only one, or the base where there is none; null: the base; left out with
 * several loaded: ERR_QLORA_ADAPTER_REQUIRED; an unknown name is an error, never the base.
 */
export type AdapterChoice = string | null;

export type { TextStream, TokenStream } from './generate/streams.js';

export interface MemoryUse {
  device: Device;
  liveBytes: number;
  peakBytes: number;
  /** Live bytes of weights, adapters, optimizer, activations and scratch. */
  byClass: Record<string, number>;
}

const loadSchema = z.strictObject({
  quantization: z.union([z.literal('none'), z.looseObject({ skipModules: z.array(z.string()).optional() })]).optional(),
  computeDtype: z.enum(['bf16', 'f16', 'f32']).optional(),
  device: z.union([z.enum(['auto', 'cpu']), z.string().regex(/^cuda:\d+$/)]).optional(),
  allowUnknownConfig: z.array(z.string()).optional(),
  offline: z.boolean().optional(),
  revision: z.string().optional(),
  signal: z.instanceof(AbortSignal).optional(),
  onProgress: z.custom<LoadOptions['onProgress']>((f) => typeof f === 'function', 'expected a function').optional(),
});

/** @internal Defaults filled in, wrong options refused. */
export function resolveLoadOptions(options: LoadOptions, where: string) {
  const { quantization: given } = options ?? {};
  if (typeof given === 'string' && given !== 'none') {
    const what = `option 'quantization': expected "none" or an object, got "${given}"`;
    throw new QLoRAError('ERR_QLORA_OPTION_INVALID', `${where}: ${what}`, {
      hint: typeByName(given) ?? "Write { type: 'nf4' }, or leave it out for that.",
      detail: { option: 'quantization' },
    });
  }
  const {
    quantization = {},
    computeDtype = 'bf16',
    device = 'auto',
    ...rest
  } = checkOptions(loadSchema, options, where);
  return {
    quantization: resolveQuantization(quantization),
    computeDtype,
    device: chooseDevice(device as Device | 'auto'),
    ...rest,
  };
}

const passSchema = z.strictObject({ adapter: z.string().nullable().optional() });
const mergeSchema = passSchema.extend({ signal: z.instanceof(AbortSignal).optional() });
/** @internal */
export const loraSchema = z.strictObject({
  r: z.int().min(1).optional(),
  alpha: z.number().optional(),
  dropout: z.number().min(0).lt(1).optional(),
  targetModules: z.union([z.literal('all-linear'), z.instanceof(RegExp), z.array(z.string())]).optional(),
  rankPattern: z.record(z.string(), z.int().min(1)).optional(),
  alphaPattern: z.record(z.string(), z.number()).optional(),
  useRslora: z.boolean().optional(),
  useDora: z.boolean().optional(),
  modulesToSave: z.array(z.string().min(1)).optional(),
  init: z.enum(['default', 'pissa']).optional(),
  seed: z.int().min(0).optional(),
});

/** A decoder whose linear layers are held in 4 bits, 8, or as the files have them, on a stream of its own. */
export class QuantizedModel implements AsyncDisposable {
  /** @internal */
  readonly core: ModelCore;
  /** As it was given to load(); adapters are looked for in the same way. */
  readonly #offline: boolean | undefined;

  private constructor(core: ModelCore, offline: boolean | undefined) {
    this.core = core;
    this.#offline = offline;
  }

  /**
   * Loads a Hugging Face model folder, or where there is none of that name `owner/name` of the hub, which is downloaded
   * into Hugging Face's cache with @huggingface/hub. Read are config.json, safetensors in one file or shards, and where they are there
   * generation_config.json, tokenizer.json and tokenizer_config.json. Each weight is quantized while it is read.
   *
   * @throws ERR_QLORA_MODEL_NOT_FOUND, ERR_QLORA_MODEL_UNSUPPORTED, ERR_QLORA_CONFIG_UNKNOWN_FIELD,
   *   ERR_QLORA_SAFETENSORS, ERR_QLORA_TENSOR_NOT_FOUND, ERR_QLORA_NON_FINITE, ERR_QLORA_OUT_OF_MEMORY, and of the hub
   *   ERR_QLORA_DEPENDENCY_MISSING, ERR_QLORA_HUB_ACCESS, ERR_QLORA_HUB_OFFLINE, ERR_QLORA_DOWNLOAD_FAILED
   */
  static load(directory: string, options: LoadOptions = {}): Promise<QuantizedModel> {
    return QuantizedModel.loadWith(directory, options, 'as-in-file');
  }

  /** @internal */
  static async loadWith(
    directory: string,
    options: LoadOptions,
    storage: WeightOptions['storage'],
    purpose?: 'rehearsal',
  ): Promise<QuantizedModel> {
    const resolved = resolveLoadOptions(options, 'load');
    const { quantization, computeDtype, device, allowUnknownConfig, signal, onProgress } = resolved;
    const progress = (phase: string) => (done: number, total: number) => onProgress?.({ phase, done, total });
    const folder = await locate(directory, 'model', { ...resolved, onProgress: progress('download') });
    const core = await loadCore(folder, {
      name: directory,
      quantization,
      storage,
      computeDtype,
      device,
      allowUnknownConfig,
      signal,
      onProgress: progress('load'),
      purpose,
    });
    if (purpose !== 'rehearsal') {
      log('info', `loaded ${directory}`, { family: core.family.modelTypes[0], linears: core.weights.linears.length });
    }
    return new QuantizedModel(core, resolved.offline);
  }

  get device(): Device {
    return this.core.stream.device;
  }

  /** Bytes of the weights, without adapters. */
  get sizeBytes(): number {
    const { linears, dense } = this.core.weights;
    const bytes = { f32: 4, bf16: 2, f16: 2, i32: 4, u8: 1, i8: 1 } as const;
    const plain = [...dense.values()].reduce((sum, t) => sum + t.size * bytes[t.dtype], 0);
    return linears.reduce((sum, { weight }) => sum + (weight.isDense ? 0 : weight.sizeBytes), plain);
  }

  /** config.json as it was read. */
  get config(): Readonly<Record<string, unknown>> {
    return this.core.configJson;
  }

  get adapters(): ReadonlyMap<string, LoraAdapter> {
    return this.core.adapters;
  }

  /** Of this model: its weights, adapters, and what runs on it. */
  memory(): MemoryUse {
    const { liveBytes, peakBytes, byClass } = this.core.stream.memory();
    return { device: this.device, liveBytes, peakBytes, byClass };
  }

  /** Logits [T, V] of one sequence, row-major fp32. */
  async logits(inputIds: ArrayLike<number>, options: { adapter?: AdapterChoice } = {}): Promise<Float32Array> {
    const adapter = chooseAdapter(this.core, checkOptions(passSchema, options, 'logits').adapter);
    using hidden = this.#hidden(inputIds, adapter);
    using logits = logitsOf(this.core, adapter, hidden);
    return logits.read();
  }

  /**
   * Mean cross-entropy over labels other than -100 (label t+1 is predicted from t), natural log. Labels left out: the ids
   * themselves.
   */
  async loss(
    inputIds: ArrayLike<number>,
    labels: ArrayLike<number> = inputIds,
    options: { adapter?: AdapterChoice } = {},
  ): Promise<number> {
    const adapter = chooseAdapter(this.core, checkOptions(passSchema, options, 'loss').adapter);
    if (labels.length !== inputIds.length) {
      throw new QLoRAError(
        'ERR_QLORA_SHAPE',
        `labels must be as many as inputIds, ${inputIds.length}, got ${labels.length}`,
        {
          hint: 'Give -100 where a token does not count.',
        },
      );
    }
    const shifted = Array.from({ length: labels.length }, (_, t) => labels[t + 1] ?? -100);
    const targets = shifted.filter((label) => label !== -100);
    if (targets.length === 0) {
      throw new QLoRAError(
        'ERR_QLORA_NO_TARGETS',
        'a loss needs at least one label other than -100 behind the first, got none',
        {
          hint: 'Leave labels out to count every token.',
        },
      );
    }
    checkIds(targets, this.core.config.vocabSize, 'labels');
    using hidden = this.#hidden(inputIds, adapter);
    using target = Tensor.from(this.core.stream, Int32Array.from(shifted), [shifted.length]);
    using loss = linearCrossEntropy(undefined, hidden, decoderOf(this.core, adapter).head, target, {
      scale: 1 / targets.length,
    });
    return (await loss.read())[0] as number;
  }

  /**
   * Continues a prompt. A string is continued as it is; messages go through the chat template; an instruction through
   * the template that the adapter was trained with.
   */
  generate(
    prompt: string | ChatMessage[] | { instruction: string; input?: string },
    options: GenerateOptions = {},
  ): TextStream {
    return textStream(this.core, prompt, options);
  }

  /**
   * As generate() for each prompt, but all of them a token further with each pass, which reads the weights once: several
   * times the tokens a second of one after the other. Each text is that of generate() up to rounding, which depends on
   * how many there are; a sampled one depends on its place too. Not with beams.
   *
   * @throws as generate(), also where one prompt alone is at fault
   */
  generateBatch(
    prompts: readonly (string | ChatMessage[] | { instruction: string; input?: string })[],
    options: GenerateOptions = {},
  ): Promise<string[]> {
    return generateTexts(this.core, prompts, options);
  }

  /**
   * Ids in, new ids out. `ignoreEos` goes on to maxNewTokens. `stop` alone needs a tokenizer: the ids are those whose
   * text lies wholly before a stop string.
   */
  generateTokens(inputIds: ArrayLike<number>, options: GenerateOptions & { ignoreEos?: boolean } = {}): TokenStream {
    return tokenStream(this.core, inputIds, options);
  }

  /** A new adapter that changes nothing until it is trained. */
  addLora(name: string, options: LoraOptions = {}): LoraAdapter {
    return createAdapter(this.core, name, checkOptions(loraSchema, options, 'addLora'));
  }

  /** An adapter from a PEFT folder, or from the hub as load() takes a model. */
  async loadLora(name: string, directory: string): Promise<LoraAdapter> {
    return loadAdapter(this.core, name, await locate(directory, 'adapter', { offline: this.#offline }));
  }

  removeLora(name: string): void {
    const adapter = this.core.adapters.get(chooseAdapter(this.core, name) as string) as LoraAdapter;
    detach(this.core, adapter);
  }

  /** The model as a Hugging Face folder: 4- and 8-bit layers as bitsandbytes stores them, the rest in its own dtype. */
  save(outDirectory: string): Promise<void> {
    return saveModel(this.core, outDirectory, mannersOf(this.core, undefined));
  }

  /**
   * Merges an adapter into the dequantized weights and writes a Hugging Face model folder, which must be new or empty:
   * config.json, safetensors (in shards above 5 GB) in the dtype that the model's files had, tokenizer, and how the
   * adapter was trained to be asked. Sums are made in fp32 and rounded once. Then the folder is loaded, for which memory
   * for the unquantized model is needed, and compared. Where it fails or is aborted, nothing is left.
   *
   * @returns logitDrift: the largest absolute difference between the logits of this model with the adapter and of the
   *   merged one, over 16 ids spread over the vocabulary, both in this model's computeDtype. The log says whether it is
   *   what rounding explains.
   * @throws ERR_QLORA_OUTPUT_EXISTS, ERR_QLORA_DISK_FULL, ERR_QLORA_WRITE_FAILED, ERR_QLORA_NON_FINITE (a sum that the
   *   dtype cannot hold), the signal's reason
   */
  async merge(
    outDirectory: string,
    options: { adapter?: AdapterChoice; signal?: AbortSignal } = {},
  ): Promise<{ logitDrift: number }> {
    const { core } = this;
    const { adapter: choice, signal } = checkOptions(mergeSchema, options, 'merge');
    const adapter = chooseAdapter(core, choice);
    const drift = await mergeModel(core, outDirectory, { adapter, manners: mannersOf(core, adapter), signal });
    log(isRounding(drift) ? 'info' : 'warn', driftSentence(drift), drift);
    return { logitDrift: drift.logitDrift };
  }

  /** Frees everything. What was enqueued before is finished first. */
  dispose(): Promise<void> {
    return disposeCore(this.core);
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.dispose();
  }

  #hidden(inputIds: ArrayLike<number>, adapter: string | undefined): Tensor {
    const { core } = this;
    checkIds(inputIds, core.config.vocabSize);
    if (inputIds.length === 0) {
      throw new QLoRAError('ERR_QLORA_ARGUMENT', 'inputIds must have at least one id, got none', {
        hint: 'Encode a text that is not empty.',
      });
    }
    const rows = { tokens: Int32Array.from(inputIds), batch: 1, length: inputIds.length };
    return hiddenStates(core, undefined, rows, { adapter, checkpointing: 'none' });
  }
}

function resolveQuantization(quantization: NonNullable<LoadOptions['quantization']>): WeightOptions['quantization'] {
  if (quantization === 'none') return undefined;
  const { skipModules = [], ...options } = quantization;
  return { ...resolveQuantizeOptions(options, 'quantization.'), skipModules };
}
