/** A PEFT LoRA folder: adapter_config.json and adapter_model.safetensors, as PEFT 0.21 writes and reads them. */
import { readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { QLoRAError } from '../errors.js';
import { writeFileAtomic } from './atomic-file.js';
import { Fields, isObject, readJsonObject, show } from './json.js';
import { fileInside } from './model-folder.js';
import { PythonFloat, pythonJson, sortKeys } from './python-json.js';
import { openSafetensors, type SafetensorsFile } from './safetensors.js';

/** What an adapter_config.json says, with PEFT's defaults filled in. */
export interface AdapterConfig {
  /** Folder or hub name of the base model. */
  readonly baseModel?: string;
  readonly r: number;
  readonly alpha: number;
  readonly dropout: number;
  /** Names that end a module path at a dot; or one string: 'all-linear', or a regular expression of whole paths. */
  readonly targetModules: readonly string[] | string;
  readonly excludeModules?: readonly string[] | string;
  /** Only these layers; all where it is empty. */
  readonly layersToTransform: readonly number[];
  /** The names before a layer's number in a path; any where it is empty. */
  readonly layersPattern: readonly string[];
  /** r, and alpha, of modules whose path ends in a match of the key. */
  readonly rankPattern: Readonly<Record<string, number>>;
  readonly alphaPattern: Readonly<Record<string, number>>;
  readonly modulesToSave: readonly string[];
  readonly useRslora: boolean;
  readonly useDora: boolean;
}

/** Without it a folder is no adapter. */
export const adapterConfigName = 'adapter_config.json';
const weightsName = 'adapter_model.safetensors';

/** Fields of PEFT 0.21 with what it writes where they are not used. What is not named in AdapterConfig must be so. */
const unusedFields: Readonly<Record<string, unknown>> = {
  alora_invocation_tokens: null,
  arrow_config: null,
  bias: 'none',
  corda_config: null,
  ensure_weight_tying: false,
  eva_config: null,
  fan_in_fan_out: false,
  kasa_config: null,
  layer_replication: null,
  loftq_config: {},
  lora_bias: false,
  lora_ga_config: null,
  megatron_config: null,
  monteclora_config: null,
  target_parameters: null,
  trainable_token_indices: null,
  use_bdlora: null,
  use_qalora: false,
  velora_config: null,
};

/** Fields that change nothing of what a loaded adapter computes. */
const harmlessFields: Readonly<Record<string, unknown>> = {
  auto_mapping: null,
  inference_mode: true,
  megatron_core: 'megatron.core',
  // The version whose layout this is.
  peft_version: '0.21.2',
  qalora_group_size: 16,
  revision: null,
  task_type: 'CAUSAL_LM',
};

const readFields = new Set([
  'alpha_pattern',
  'base_model_name_or_path',
  'exclude_modules',
  'init_lora_weights',
  'layers_pattern',
  'layers_to_transform',
  'lora_alpha',
  'lora_dropout',
  'modules_to_save',
  'peft_type',
  'r',
  'rank_pattern',
  'target_modules',
  'use_dora',
  'use_rslora',
  'runtime_config',
]);

/** Initializations that also change the base's weights, so that the saved A and B belong to another base. */
const changesBase = /^(pissa|olora|corda|loftq|lora_ga)/;

/**
 * Reads adapter_config.json of a PEFT folder.
 *
 * @throws ERR_QLORA_ADAPTER_NOT_FOUND (no such folder, or no adapter in it), ERR_QLORA_ADAPTER_UNSUPPORTED (names every
 *   field whose value we cannot represent), ERR_QLORA_CONFIG_INVALID, ERR_QLORA_JSON, ERR_QLORA_UNSAFE_PATH
 */
export async function readAdapterConfig(directory: string): Promise<AdapterConfig> {
  await requireFile(directory, adapterConfigName);
  const path = await fileInside(directory, adapterConfigName);
  const fields = new Fields(path, await readJsonObject(path));
  refuseUnsupported(fields);
  const r = fields.count('r') ?? 8;
  if (r === 0) fields.fail('r', 'at least 1');
  const rankPattern = fields.numbersByName('rank_pattern') ?? {};
  if (!Object.values(rankPattern).every((n) => Number.isSafeInteger(n) && n > 0)) {
    fields.fail('rank_pattern', 'an object of positive integers');
  }
  const dropout = fields.number('lora_dropout') ?? 0;
  if (dropout < 0 || dropout >= 1) fields.fail('lora_dropout', 'at least 0 and below 1');
  const targetModules = modules(fields, 'target_modules');
  if (targetModules === undefined) return fields.fail('target_modules', 'a string or a list of strings');
  return {
    baseModel: fields.string('base_model_name_or_path'),
    r,
    alpha: fields.number('lora_alpha') ?? 8,
    dropout,
    targetModules,
    excludeModules: modules(fields, 'exclude_modules'),
    layersToTransform: fields.counts('layers_to_transform') ?? [],
    layersPattern: fields.strings('layers_pattern') ?? [],
    rankPattern,
    alphaPattern: fields.numbersByName('alpha_pattern') ?? {},
    modulesToSave: fields.strings('modules_to_save') ?? [],
    useRslora: fields.boolean('use_rslora') ?? false,
    useDora: fields.boolean('use_dora') ?? false,
  };
}

function modules(fields: Fields, key: string): readonly string[] | string | undefined {
  const value = fields.raw(key);
  return typeof value === 'string' ? value : fields.strings(key);
}

function refuseUnsupported(fields: Fields): void {
  const type = fields.string('peft_type') ?? 'LORA';
  if (type !== 'LORA') {
    throw new QLoRAError(
      'ERR_QLORA_ADAPTER_UNSUPPORTED',
      `${fields.path}: the adapter is of peft_type ${show(type)}, this library knows "LORA" alone`,
      {
        hint: 'Merge it into its base in Python, with merge_and_unload() and save_pretrained(), and load that model.',
        detail: { path: fields.path, type },
      },
    );
  }
  const found: string[] = [];
  const init = fields.raw('init_lora_weights');
  if (typeof init === 'string' && changesBase.test(init)) {
    found.push(
      `init_lora_weights ${show(init)} (A and B belong to a changed base: convert them in PEFT with path_initial_model_for_weight_conversion)`,
    );
  }
  for (const [key, value] of Object.entries(fields.object)) {
    if (readFields.has(key) || Object.hasOwn(harmlessFields, key) || isUnused(value, unusedFields[key])) continue;
    found.push(`${key} ${show(value)}`);
  }
  if (found.length === 0) return;
  throw new QLoRAError(
    'ERR_QLORA_ADAPTER_UNSUPPORTED',
    `${fields.path} uses what this library does not support: ${found.join('; ')}`,
    {
      hint: 'Train the adapter without it, or convert it with PEFT.',
      detail: { path: fields.path, fields: found },
    },
  );
}

function isUnused(value: unknown, unused: unknown): boolean {
  if (value === null || value === false || value === unused) return true;
  return (Array.isArray(value) && value.length === 0) || (isObject(value) && Object.keys(value).length === 0);
}

/** The content of adapter_config.json for `config`, as PEFT writes it. */
export function adapterConfigJson(config: AdapterConfig): string {
  const orNull = <T>(list: readonly T[]) => (list.length ? list : null);
  const sorted = (list: readonly string[] | string) => (typeof list === 'string' ? list : [...list].sort());
  const fields = {
    ...unusedFields,
    ...harmlessFields,
    alpha_pattern: config.alphaPattern,
    base_model_name_or_path: config.baseModel ?? null,
    exclude_modules: config.excludeModules ? sorted(config.excludeModules) : null,
    init_lora_weights: true,
    layers_pattern: orNull(config.layersPattern),
    layers_to_transform: orNull(config.layersToTransform),
    lora_alpha: config.alpha,
    lora_dropout: new PythonFloat(config.dropout),
    modules_to_save: orNull(config.modulesToSave),
    peft_type: 'LORA',
    r: config.r,
    rank_pattern: config.rankPattern,
    target_modules: sorted(config.targetModules),
    use_dora: config.useDora,
    use_rslora: config.useRslora,
  };
  return `${pythonJson(sortKeys(fields), 2)}\n`;
}

/** Writes adapter_config.json, atomically. @throws ERR_QLORA_DISK_FULL, ERR_QLORA_WRITE_FAILED */
export function writeAdapterConfig(directory: string, config: AdapterConfig): Promise<void> {
  return writeFileAtomic(join(directory, adapterConfigName), adapterConfigJson(config));
}

/** Opens adapter_model.safetensors of a PEFT folder. @throws ERR_QLORA_ADAPTER_NOT_FOUND, ERR_QLORA_PICKLE and openSafetensors' */
export async function openAdapterWeights(directory: string): Promise<SafetensorsFile> {
  await requireFile(directory, weightsName);
  return openSafetensors(await fileInside(directory, weightsName));
}

export const adapterWeightsPath = (directory: string): string => join(directory, weightsName);

async function requireFile(directory: string, name: string): Promise<void> {
  let names: string[];
  try {
    names = await readdir(directory);
  } catch (cause) {
    throw new QLoRAError('ERR_QLORA_ADAPTER_NOT_FOUND', `${directory}: there is no such folder`, {
      hint: `Pass the path of a folder that holds ${adapterConfigName} and ${weightsName}.`,
      cause,
    });
  }
  if (names.includes(name)) return;
  if (name === weightsName && names.includes('adapter_model.bin')) {
    throw new QLoRAError(
      'ERR_QLORA_PICKLE',
      `${directory} holds its weights only as adapter_model.bin, a pickle, which can run code`,
      {
        hint: 'Convert it once with Python: PeftModel.from_pretrained(base, folder).save_pretrained(newFolder).',
      },
    );
  }
  throw new QLoRAError('ERR_QLORA_ADAPTER_NOT_FOUND', `${directory} holds no ${name}`, {
    hint: 'Pass the folder that PEFT or this library saved an adapter to.',
  });
}

/** What a tensor of an adapter is: LoRA's A [r, K] or B [N, r], DoRA's magnitude [N], or a tensor of a module saved whole. */
export type AdapterPart = 'A' | 'B' | 'magnitude' | 'whole';

const prefix = 'base_model.model.';
const suffixes = { A: '.lora_A.weight', B: '.lora_B.weight', magnitude: '.lora_magnitude_vector' } as const;

/** The key of a part of module `path`; of a whole module's tensor, `path` is the tensor's name. */
export function adapterKey(path: string, part: AdapterPart): string {
  return part === 'whole' ? prefix + path : prefix + path + suffixes[part];
}
