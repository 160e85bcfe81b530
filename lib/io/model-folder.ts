/** A Hugging Face model folder: config.json, generation_config.json and the weights, in one safetensors file or in shards. */
import { readdir, realpath } from 'node:fs/promises';
import { basename, dirname, join, sep } from 'node:path';
import { didYouMean, QLoRAError } from '../errors.js';
import type { Tensor } from '../tensor.js';
import { type GenerationConfig, parseGenerationConfig } from './generation-config.js';
import { isObject, type JsonObject, readJsonObject, show } from './json.js';
import { openSafetensors, type SafetensorsEntry, type SafetensorsFile } from './safetensors.js';

export interface ModelTensor extends SafetensorsEntry {
  readonly file: SafetensorsFile;
}

const singleName = 'model.safetensors';
const indexName = 'model.safetensors.index.json';
const pickled = /\.(bin|pt|pth|ckpt|pkl)$/;

/** An open folder. `close()` it; reads under way are finished first. */
export class ModelFolder implements Disposable {
  constructor(
    readonly directory: string,
    /** config.json as it is. */
    readonly config: JsonObject,
    /** Of generation_config.json; of config.json, as older models have it, where that is missing. */
    readonly generationConfig: GenerationConfig,
    readonly tensors: ReadonlyMap<string, ModelTensor>,
    private readonly files: readonly SafetensorsFile[],
  ) {}

  /** @throws ERR_QLORA_TENSOR_NOT_FOUND */
  entry(name: string): ModelTensor {
    const entry = this.tensors.get(name);
    if (entry) return entry;
    const near = didYouMean(name, this.tensors.keys());
    throw new QLoRAError('ERR_QLORA_TENSOR_NOT_FOUND', `${this.directory} holds no tensor '${name}'`, {
      hint: near ? `Did you mean '${near}'?` : 'The folder is not complete, or config.json belongs to another model.',
      detail: { directory: this.directory, name },
    });
  }

  /** Fills `tensor` from tensor `name`; weights that are infinite or NaN are refused. See SafetensorsFile.readFinite. */
  read(name: string, tensor: Tensor): Promise<void> {
    return this.entry(name).file.readFinite(name, tensor);
  }

  /** A part of it, from element `offset` on: for weights that one file tensor holds together. */
  readPart(name: string, tensor: Tensor, offset: number): Promise<void> {
    return this.entry(name).file.readFinitePart(name, tensor, offset);
  }

  close(): void {
    for (const file of this.files) file.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }
}

/**
 * Opens a model folder and checks that its files belong together. No weight is read yet.
 *
 * @throws ERR_QLORA_MODEL_NOT_FOUND (no such folder, or no model in it), ERR_QLORA_PICKLE (only .bin or .pt weights),
 *   ERR_QLORA_UNSAFE_PATH (a file that leaves the folder), ERR_QLORA_INDEX (index and shards disagree),
 *   ERR_QLORA_JSON, ERR_QLORA_CONFIG_INVALID, ERR_QLORA_SAFETENSORS, ERR_QLORA_READ_FAILED
 */
export async function openModelFolder(directory: string): Promise<ModelFolder> {
  const names = await listModelFolder(directory);
  if (!names.has('config.json')) {
    throw new QLoRAError('ERR_QLORA_MODEL_NOT_FOUND', `${directory} holds no config.json`, {
      hint: names.has('adapter_config.json')
        ? 'This is an adapter: load the model it belongs to, then the adapter with loadLora().'
        : 'Pass the folder of a Hugging Face model.',
    });
  }
  const configPath = await fileInside(directory, 'config.json');
  const config = await readJsonObject(configPath);
  const generationConfig = names.has('generation_config.json')
    ? await readGenerationConfig(await fileInside(directory, 'generation_config.json'))
    : parseGenerationConfig(configPath, config);
  const files: SafetensorsFile[] = [];
  try {
    const tensors = new Map<string, ModelTensor>();
    if (names.has(singleName)) {
      const file = await openSafetensors(await fileInside(directory, singleName));
      files.push(file);
      for (const [name, entry] of file.tensors) tensors.set(name, { ...entry, file });
    } else if (names.has(indexName)) {
      await openShards(directory, files, tensors);
    } else {
      refuseMissingWeights(directory, names);
    }
    return new ModelFolder(directory, config, generationConfig, tensors, files);
  } catch (error) {
    for (const file of files) file.close();
    throw error;
  }
}

async function readGenerationConfig(path: string): Promise<GenerationConfig> {
  return parseGenerationConfig(path, await readJsonObject(path));
}

/** The names in a folder. @throws ERR_QLORA_MODEL_NOT_FOUND */
async function listModelFolder(directory: string): Promise<Set<string>> {
  try {
    return new Set(await readdir(directory));
  } catch (cause) {
    const { code, message } = cause as NodeJS.ErrnoException;
    const what = code === 'ENOENT' ? 'there is no such folder' : code === 'ENOTDIR' ? 'this is no folder' : message;
    throw new QLoRAError('ERR_QLORA_MODEL_NOT_FOUND', `${directory}: ${what}`, {
      hint: 'Pass the path of a folder that holds config.json and model.safetensors.',
      cause,
    });
  }
}

function refuseMissingWeights(directory: string, names: ReadonlySet<string>): never {
  const pickle = [...names].find((name) => pickled.test(name));
  if (pickle) {
    throw new QLoRAError(
      'ERR_QLORA_PICKLE',
      `${directory} holds its weights only as ${pickle}, a pickle, which can run code`,
      {
        hint:
          'Convert it once with Python: from transformers import AutoModelForCausalLM; ' +
          'AutoModelForCausalLM.from_pretrained(folder).save_pretrained(newFolder, safe_serialization=True).',
      },
    );
  }
  throw new QLoRAError('ERR_QLORA_MODEL_NOT_FOUND', `${directory} holds neither ${singleName} nor ${indexName}`, {
    hint: 'Download the weights too; the folder holds only the rest of the model.',
  });
}

/**
 * The path of file `name` of a folder. Symbolic links may lead only where Hugging Face's cache leads them, from
 * snapshots/<revision>/ to blobs/, or stay inside the folder.
 *
 * @throws ERR_QLORA_UNSAFE_PATH, ERR_QLORA_FILE_NOT_FOUND
 */
export async function fileInside(directory: string, name: string): Promise<string> {
  const path = join(directory, name);
  const folder = await realpath(directory);
  const real = await realpath(path).catch((cause) => {
    throw new QLoRAError('ERR_QLORA_FILE_NOT_FOUND', `${path}: there is no such file`, {
      hint: 'Download the model again; the folder is not complete.',
      cause,
    });
  });
  const blobs = basename(dirname(folder)) === 'snapshots' ? join(dirname(dirname(folder)), 'blobs') : undefined;
  if (real.startsWith(folder + sep) || (blobs && dirname(real) === blobs)) return path;
  throw new QLoRAError('ERR_QLORA_UNSAFE_PATH', `${path} is a link that leaves its folder, to ${real}`, {
    hint: 'Put the file itself into the folder.',
  });
}

async function openShards(
  directory: string,
  files: SafetensorsFile[],
  tensors: Map<string, ModelTensor>,
): Promise<void> {
  const path = await fileInside(directory, indexName);
  const { weight_map: map } = await readJsonObject(path);
  if (!isObject(map)) badIndex(path, `'weight_map' must be an object, got ${show(map)}`);
  const shards = new Map<string, SafetensorsFile>();
  for (const [name, shard] of Object.entries(map)) {
    checkShardName(path, name, shard);
    let file = shards.get(shard);
    if (!file) {
      file = await openSafetensors(await fileInside(directory, shard));
      shards.set(shard, file);
      files.push(file);
    }
    const entry = file.tensors.get(name);
    if (!entry) badIndex(path, `tensor '${name}' should be in ${shard}, which does not hold it`);
    tensors.set(name, { ...entry, file });
  }
  for (const [shard, file] of shards) {
    for (const name of file.tensors.keys()) {
      if (tensors.get(name)?.file !== file)
        badIndex(path, `${shard} holds a tensor '${name}' that the index does not place there`);
    }
  }
}

function checkShardName(path: string, name: string, shard: unknown): asserts shard is string {
  if (typeof shard !== 'string') badIndex(path, `the file of '${name}' must be a string, got ${show(shard)}`);
  if (shard.length > 255 || /[/\\\0]/.test(shard) || !shard.endsWith('.safetensors') || shard.startsWith('.')) {
    if (pickled.test(shard)) badIndex(path, `the file of '${name}' is ${show(shard)}, a pickle`);
    throw new QLoRAError(
      'ERR_QLORA_UNSAFE_PATH',
      `${path}: the file of '${name}' is ${show(shard)}, not the plain name of a safetensors file`,
      {
        hint: 'Names of shards look like model-00001-of-00002.safetensors, without a folder.',
      },
    );
  }
}

function badIndex(path: string, message: string): never {
  throw new QLoRAError('ERR_QLORA_INDEX', `${path}: ${message}`, {
    hint: 'Index and shards do not belong together, or a shard is of another download: fetch the model again.',
  });
}
