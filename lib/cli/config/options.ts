/** Our own options under their own names. Ranges and defaults are the trainer's; a test holds the names to its schema. */
import { z } from 'zod';
import { boolean, bytes, list, maps, modules, number, type Rules, splitList, text, toBytes, whole } from './rules.js';

/** A number where it reads as one: a share or a count. */
const numberOrPath = (value: unknown) =>
  typeof value === 'string' && value.trim() !== '' && Number.isFinite(Number(value)) ? Number(value) : value;

const dataset = z.union([
  text,
  z.array(
    z.union([
      text,
      z.strictObject({
        source: text,
        format: text.optional(),
        maxSamples: whole.optional(),
        weight: number.optional(),
      }),
    ]),
  ),
]);

const none = z.literal('none');
const numbersByName = z.record(z.string(), z.number());

/** Options of the trainer. */
export const trainerRules: Rules = {
  model: maps('model', text, 'a Hugging Face model folder, or owner/name on the hub'),
  dataset: maps(
    'dataset',
    dataset,
    'a file, a folder, several with commas; in a file also a list with settings of each',
  ),
  evalDataset: maps(
    'evalDataset',
    z.union([number, text]),
    'a file, a share below 1, or a count to set apart',
    numberOrPath,
  ),
  datasetFormat: maps('datasetFormat', text, 'how records become rows; default: by their fields'),
  template: maps('template', text, 'how instructions become prompts; default alpaca'),
  quantization: maps(
    'quantization',
    z.literal('none', {
      error: "expected 'none'; 4 bits are quantization.type nf4, the default, or fp4, and 8 bits are int8",
    }),
    "'none' keeps the files' type",
  ),
  'quantization.type': maps('quantization.type', text, 'nf4 (default), fp4 or int8'),
  'quantization.blockSize': maps('quantization.blockSize', whole, 'weights that share a scale; default 64'),
  'quantization.doubleQuant': maps('quantization.doubleQuant', boolean, 'quantize the scales too; default true'),
  'quantization.skipModules': maps('quantization.skipModules', list, 'modules that stay as they are', splitList),
  computeDtype: maps('computeDtype', text, 'bf16 (default), f16 or f32'),
  device: maps('device', text, 'auto (default), cpu or cuda:N'),
  offline: maps('offline', boolean, 'take owner/name from the cache, and ask no hub'),
  revision: maps('revision', text, 'of owner/name: branch, tag or commit; default main'),
  maxMemory: maps('maxMemory', bytes, 'most bytes on the device, as 24GB', toBytes),
  lora: maps('lora', none, "'none' trains all weights; needs quantization none"),
  'lora.r': maps('lora.r', whole, 'rank; default 64'),
  'lora.alpha': maps('lora.alpha', number, 'the adapter counts alpha / r; default 16'),
  'lora.dropout': maps('lora.dropout', number, 'default 0'),
  'lora.targetModules': maps(
    'lora.targetModules',
    list,
    'names, or /a regular expression/; default all-linear',
    modules,
  ),
  'lora.rankPattern': maps('lora.rankPattern', numbersByName, 'ranks of modules by name'),
  'lora.alphaPattern': maps('lora.alphaPattern', numbersByName, 'alphas of modules by name'),
  'lora.modulesToSave': maps(
    'lora.modulesToSave',
    list,
    'trained whole beside the adapter: embed_tokens, lm_head',
    splitList,
  ),
  'lora.useRslora': maps('lora.useRslora', boolean, 'the adapter counts alpha / sqrt(r); default false'),
  'lora.useDora': maps('lora.useDora', boolean, 'DoRA; default false'),
  'lora.init': maps('lora.init', text, 'default or pissa'),
  'lora.seed': maps('lora.seed', whole, "of A's start; default: seed"),
  initialAdapter: maps('initialAdapter', text, 'a PEFT folder to go on from'),
  outputDir: maps('outputDir', text, 'where the run goes'),
  batchSize: maps('batchSize', whole, 'rows a micro-step; default 1'),
  gradientAccumulationSteps: maps('gradientAccumulationSteps', whole, 'micro-steps a step; default 16'),
  maxSteps: maps('maxSteps', whole, 'with epochs: what is reached first ends the run'),
  epochs: maps('epochs', number, 'default 3 where maxSteps is not given'),
  learningRate: maps('learningRate', number, 'default 2e-4'),
  weightDecay: maps('weightDecay', number, 'default 0'),
  maxGradNorm: maps('maxGradNorm', number, 'gradients are scaled down to it; default 0.3, 0: never'),
  adamBeta1: maps('adamBeta1', number, 'default 0.9'),
  adamBeta2: maps('adamBeta2', number, 'default 0.999'),
  adamEpsilon: maps('adamEpsilon', number, 'default 1e-8'),
  momentum: maps('momentum', number, 'of sgd; default 0'),
  'ademamix.beta3': maps('ademamix.beta3', number, 'default 0.9999'),
  'ademamix.alpha': maps('ademamix.alpha', number, 'default 5'),
  loraPlusRatio: maps('loraPlusRatio', number, 'LoRA+: B learns so many times as fast; default 1'),
  neftuneNoiseAlpha: maps('neftuneNoiseAlpha', number, 'NEFTune; default 0'),
  lrScheduler: maps('lrScheduler', text, 'constant (default), linear, cosine, and more'),
  'schedulerOptions.numCycles': maps('schedulerOptions.numCycles', number, 'of cosine and cosine_with_restarts'),
  'schedulerOptions.power': maps('schedulerOptions.power', number, 'of polynomial'),
  'schedulerOptions.lrEnd': maps('schedulerOptions.lrEnd', number, 'of polynomial'),
  warmupRatio: maps('warmupRatio', number, 'share of the steps; default 0.03'),
  warmupSteps: maps('warmupSteps', whole, 'wins over warmupRatio'),
  optimizer: maps('optimizer', text, 'default paged_adamw_32bit'),
  gradientCheckpointing: maps('gradientCheckpointing', z.union([boolean, z.literal('auto')]), 'default true'),
  activationOffloading: maps('activationOffloading', boolean, "layers' inputs go to the host; default false"),
  groupByLength: maps('groupByLength', boolean, 'rows of like length in one step; default false'),
  packing: maps('packing', boolean, 'several rows in one sequence, apart from each other; default false'),
  trainOnSource: maps('trainOnSource', boolean, 'train the prompt too; default false'),
  maskHistory: maps('maskHistory', boolean, 'of a conversation train the last answer only; default false'),
  maxLength: maps('maxLength', whole, 'most tokens of a row'),
  sourceMaxLength: maps('sourceMaxLength', whole, 'most tokens of a prompt; default 1024'),
  targetMaxLength: maps('targetMaxLength', whole, 'most tokens of an answer; default 256'),
  maxTrainSamples: maps('maxTrainSamples', whole, 'most rows to train on'),
  maxEvalSamples: maps('maxEvalSamples', whole, 'most rows to evaluate on'),
  evalSteps: maps('evalSteps', whole, 'evaluate every so many steps; default: at the end'),
  saveSteps: maps('saveSteps', whole, 'a checkpoint every so many steps; default 250'),
  saveTotalLimit: maps('saveTotalLimit', whole, 'checkpoints that are kept; default 40'),
  keepBest: maps('keepBest', boolean, 'end with the best evaluated step; default false'),
  earlyStoppingPatience: maps('earlyStoppingPatience', whole, 'evaluations without a lower loss that end the run'),
  loggingSteps: maps('loggingSteps', whole, 'a line every so many steps; default 10'),
  reportTo: maps('reportTo', z.literal('tensorboard'), 'event files too'),
  seed: maps('seed', whole, 'of everything random; default 42'),
};

/** What only the command line does. */
const runRules: Rules = {
  resume: maps('@resume', z.union([boolean, text]), 'go on from the newest checkpoint in outputDir, or from this one'),
  overwrite: maps(
    '@overwrite',
    boolean,
    'begin anew where an earlier run lies, whose result is replaced; default false',
  ),
  exportDir: maps('@exportDir', text, 'write the model with the adapter merged here when the run is done'),
};

export const ourRules: Rules = { ...trainerRules, ...runRules };
