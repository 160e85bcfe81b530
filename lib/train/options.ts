import { z } from 'zod';
import type { DatasetSource } from '../data/read-rows.js';
import { formatNames } from '../data/rows.js';
import { checkTemplate } from '../data/templates.js';
import { chooseDevice } from '../devices.js';
import { didYouMean, QLoRAError } from '../errors.js';
import type { LoraOptions } from '../models/lora-adapter.js';
import { checkOptions } from '../options.js';
import { type LoadOptions, loraSchema, QuantizedModel, resolveLoadOptions } from '../quantized-model.js';
import type { Device } from '../tensor.js';
import { type ScheduleName, scheduleNames } from './schedule.js';

export interface MixedDataset {
  source: DatasetSource;
  /** Default: inferred from the fields. */
  format?: string;
  /** At most so many of its rows, the first ones. */
  maxSamples?: number;
  /**
   * How often each of its rows comes, against each row of the other sets; only proportions matter. Rows of the smallest
   * weight come once an epoch. Default 1.
   */
  weight?: number;
}

/** Names and defaults are those of QLoRA's own script and of Hugging Face, in camelCase. */
export interface TrainerOptions {
  /** A model folder, `owner/name` on the hub, or a model. A model passed in is not disposed of with the trainer. */
  model: string | QuantizedModel;
  /** A file (JSON, JSONL, CSV, TSV, parquet; also .gz), a folder of such, rows, or several of these. */
  dataset: DatasetSource | MixedDataset[];
  /** A number below 1 is a share split off the data set, one from 1 on a count; the split is seeded. */
  evalDataset?: DatasetSource | number;
  datasetFormat?: string;
  /** How rows are written; default: instructions as 'alpaca', QLoRA's, conversations by the model's own template. */
  template?: string;
  quantization?: LoadOptions['quantization'];
  computeDtype?: LoadOptions['computeDtype'];
  device?: LoadOptions['device'];
  /** Of a model named `owner/name`: see LoadOptions. */
  offline?: boolean;
  revision?: string;
  /**
   * Bytes on the device: a plan above it is an error before anything is loaded, and a model that the trainer loads takes
   * no more. Default: no limit.
   */
  maxMemory?: number;
  /** 'none' is full fine-tuning: needs quantization 'none'; trained weights have fp32 masters. */
  lora?: LoraOptions | 'none';
  /** A PEFT folder to go on from; its r, alpha and targets hold. */
  initialAdapter?: string;
  outputDir: string;
  /** Rows a micro-step; default 1. */
  batchSize?: number;
  /** Micro-steps an optimizer step; default 16. */
  gradientAccumulationSteps?: number;
  /** The first of both that is reached ends the run; neither given: 3 epochs. */
  maxSteps?: number;
  epochs?: number;
  /** Default 2e-4. */
  learningRate?: number;
  /** Default 0. */
  weightDecay?: number;
  /** Gradients are scaled down to this norm; default 0.3, 0 is no clipping. */
  maxGradNorm?: number;
  /** Default 0.9. */
  adamBeta1?: number;
  /** Default 0.999. */
  adamBeta2?: number;
  /** Default 1e-8. */
  adamEpsilon?: number;
  /** Of SGD; default 0. */
  momentum?: number;
  /** Of AdEMAMix; default 0.9999 and 5. */
  ademamix?: { beta3?: number; alpha?: number };
  /** LoRA+: B learns at so many times the rate of A. Default 1. */
  loraPlusRatio?: number;
  /** NEFTune: noise on the embeddings while training, of this alpha. Default 0, none. */
  neftuneNoiseAlpha?: number;
  /** Default 'constant'. */
  lrScheduler?: ScheduleName;
  schedulerOptions?: { numCycles?: number; power?: number; lrEnd?: number };
  /** Share of the steps in which the rate rises; default 0.03 (a constant rate has no warm-up). */
  warmupRatio?: number;
  /** Wins over warmupRatio. */
  warmupSteps?: number;
  /** Default 'paged_adamw_32bit', which pages only where maxMemory demands it. */
  optimizer?: (typeof optimizerNames)[number];
  /**
   * Keep only each layer's input for the backward pass, and compute the rest again; default true. 'auto' does so for as
   * many layers as maxMemory demands or, without it, what the system has free. The bits are the same.
   */
  gradientCheckpointing?: boolean | 'auto';
  /**
   * On a GPU, keep the layers' inputs in pinned memory of the host, to which they go and from which they come beside the
   * computing; needs gradientCheckpointing. Default false. The bits are the same.
   */
  activationOffloading?: boolean;
  /** Rows of like length, in tokens, come in one step; default false. */
  groupByLength?: boolean;
  /**
   * Several rows in one sequence of at most maxLength tokens, none of which attends to another; batchSize then counts
   * sequences. Default false.
   */
  packing?: boolean;
  /** Train on the prompt too; default false. */
  trainOnSource?: boolean;
  /** Of a conversation train the last answer only; default false. */
  maskHistory?: boolean;
  /** Most tokens of a row. */
  maxLength?: number;
  /** Most tokens of a prompt and of an answer; default 1024 and 256. */
  sourceMaxLength?: number;
  targetMaxLength?: number;
  maxTrainSamples?: number;
  maxEvalSamples?: number;
  /** Evaluate every so many steps; needs evalDataset. Default: at the end, where there is something to evaluate on. */
  evalSteps?: number;
  /** Write a checkpoint every so many steps; default 250. */
  saveSteps?: number;
  /** Keep the newest so many checkpoints, and the best; default 40. */
  saveTotalLimit?: number;
  /** The best of the evaluated steps, by loss, is what the run ends with; default false. */
  keepBest?: boolean;
  /** End after so many evaluations without a lower loss; default: never. */
  earlyStoppingPatience?: number;
  /** Write a line of metrics.jsonl every so many steps; default 10. */
  loggingSteps?: number;
  /** Event files for TensorBoard beside the run's own report. */
  reportTo?: 'tensorboard';
  /** Of everything random; default 42. */
  seed?: number;
}

export const optimizerNames = [
  'paged_adamw_32bit',
  'paged_adamw_8bit',
  'adamw_32bit',
  'adamw_8bit',
  'sgd',
  'lion_32bit',
  'lion_8bit',
  'ademamix',
] as const;

const count = z.int().min(1);
const share = z.number().min(0).lt(1);
const source = z.custom<DatasetSource>(
  (value) =>
    typeof value === 'string' ||
    (typeof value === 'object' && value !== null && (Symbol.iterator in value || Symbol.asyncIterator in value)),
  'expected a path or rows',
);
const mixed = z.array(
  z.strictObject({
    source,
    format: z.string().optional(),
    maxSamples: count.optional(),
    weight: z.number().gt(0).optional(),
  }),
);

export const schema = z.strictObject({
  model: z.union([
    z.string(),
    z.custom<QuantizedModel>((value) => value instanceof QuantizedModel, 'a QuantizedModel'),
  ]),
  dataset: source,
  evalDataset: z.union([z.number().gt(0), source]).optional(),
  datasetFormat: z.string().optional(),
  template: z.string().optional(),
  quantization: z.unknown().optional(),
  computeDtype: z.enum(['bf16', 'f16', 'f32']).optional(),
  device: z.string().optional(),
  offline: z.boolean().optional(),
  revision: z.string().optional(),
  maxMemory: count.optional(),
  lora: z.union([z.literal('none'), loraSchema]).optional(),
  initialAdapter: z.string().optional(),
  outputDir: z.string().min(1),
  batchSize: count.default(1),
  gradientAccumulationSteps: count.default(16),
  maxSteps: count.optional(),
  epochs: z.number().gt(0).optional(),
  learningRate: z.number().min(0).default(2e-4),
  weightDecay: z.number().min(0).default(0),
  maxGradNorm: z.number().min(0).default(0.3),
  adamBeta1: share.default(0.9),
  adamBeta2: share.default(0.999),
  adamEpsilon: z.number().gt(0).default(1e-8),
  momentum: share.default(0),
  ademamix: z.strictObject({ beta3: share.default(0.9999), alpha: z.number().min(0).default(5) }).prefault({}),
  loraPlusRatio: z.number().gt(0).default(1),
  neftuneNoiseAlpha: z.number().min(0).default(0),
  lrScheduler: z.enum(scheduleNames).default('constant'),
  schedulerOptions: z
    .strictObject({ numCycles: z.number().optional(), power: z.number().optional(), lrEnd: z.number().optional() })
    .default({}),
  warmupRatio: share.default(0.03),
  warmupSteps: z.int().min(0).optional(),
  optimizer: z.enum(optimizerNames).default('paged_adamw_32bit'),
  gradientCheckpointing: z.union([z.boolean(), z.literal('auto')]).default(true),
  activationOffloading: z.boolean().default(false),
  groupByLength: z.boolean().default(false),
  packing: z.boolean().default(false),
  trainOnSource: z.boolean().default(false),
  maskHistory: z.boolean().default(false),
  maxLength: count.optional(),
  sourceMaxLength: count.optional(),
  targetMaxLength: count.optional(),
  maxTrainSamples: count.optional(),
  maxEvalSamples: count.optional(),
  evalSteps: count.optional(),
  saveSteps: count.default(250),
  saveTotalLimit: count.default(40),
  keepBest: z.boolean().default(false),
  earlyStoppingPatience: count.optional(),
  loggingSteps: count.default(10),
  reportTo: z.literal('tensorboard').optional(),
  seed: z.int().min(0).default(42),
});

export type ResolvedTrainerOptions = Omit<
  z.infer<typeof schema>,
  'dataset' | 'lora' | 'quantization' | 'device' | 'gradientCheckpointing'
> &
  Pick<TrainerOptions, 'dataset' | 'lora' | 'quantization' | 'device'> & {
    /** A number of layers, once memory was planned. */
    gradientCheckpointing: boolean | 'auto' | number;
  };

/** Several sources, rather than rows. */
export function isMixed(dataset: DatasetSource | MixedDataset[]): dataset is MixedDataset[] {
  return (
    Array.isArray(dataset) && dataset.length > 0 && dataset.every((d) => typeof d === 'object' && d && 'source' in d)
  );
}

/** What a run computes on. @throws ERR_QLORA_DEVICE where that cannot be used */
export function deviceOf({ model, device }: ResolvedTrainerOptions): Device {
  return typeof model === 'string' ? chooseDevice(device ?? 'auto') : model.device;
}

/** Defaults filled in; wrong options and wrong combinations are errors. */
export function resolveTrainerOptions(options: TrainerOptions): ResolvedTrainerOptions {
  const resolved = checkOptions(schema, options, 'QLoRATrainer') as ResolvedTrainerOptions;
  checkTemplate(resolved.template);
  const { dataset, datasetFormat, lora, initialAdapter, quantization, computeDtype, device, model } = resolved;
  resolveLoadOptions({ quantization, computeDtype, device }, 'QLoRATrainer');
  if (isMixed(dataset)) checkOptions(z.strictObject({ dataset: mixed }), { dataset }, 'QLoRATrainer');
  if (datasetFormat !== undefined && !formatNames().includes(datasetFormat)) {
    const near = didYouMean(datasetFormat, formatNames());
    throw new QLoRAError('ERR_QLORA_DATASET_FORMAT', `QLoRATrainer: there is no datasetFormat '${datasetFormat}'`, {
      hint: near ? `Did you mean '${near}'?` : `There are ${formatNames().join(', ')}.`,
    });
  }
  const conflict = (message: string, hint: string) =>
    new QLoRAError('ERR_QLORA_OPTION_CONFLICT', `QLoRATrainer: ${message}`, { hint });
  if (lora === 'none') {
    if (initialAdapter)
      throw conflict("initialAdapter goes with an adapter, and lora is 'none'", 'Leave one of them out.');
    if (quantization !== 'none') {
      throw conflict(
        "lora: 'none' trains the weights themselves, which needs quantization: 'none'",
        "Set quantization: 'none'.",
      );
    }
    if (typeof model !== 'string') {
      throw conflict(
        "lora: 'none' loads the weights as fp32 masters, so it takes a folder",
        'Pass the path of the model.',
      );
    }
  }
  if (resolved.activationOffloading && resolved.gradientCheckpointing === false) {
    throw conflict(
      "activationOffloading moves what gradientCheckpointing keeps, which must be true or 'auto', and is false",
      'Leave one of them out.',
    );
  }
  const { keepBest, earlyStoppingPatience, evalDataset, evalSteps } = resolved;
  const compares = keepBest ? 'keepBest' : earlyStoppingPatience && 'earlyStoppingPatience';
  if (compares && (evalDataset === undefined || evalSteps === undefined)) {
    throw conflict(
      `${compares} compares losses on evaluation rows, which needs evalDataset and evalSteps`,
      'Set both, or leave it out.',
    );
  }
  if (evalSteps !== undefined && evalDataset === undefined) {
    throw conflict('evalSteps needs evalDataset: there is nothing to evaluate on', 'Set evalDataset, or leave it out.');
  }
  if (lora && lora !== 'none' && initialAdapter) {
    throw conflict('initialAdapter brings its own r, alpha and targets', 'Leave lora out.');
  }
  if (typeof model !== 'string' && (quantization !== undefined || computeDtype !== undefined)) {
    throw conflict(
      'a model that is loaded has its quantization and computeDtype already',
      'Pass them to QuantizedModel.load().',
    );
  }
  return resolved;
}
