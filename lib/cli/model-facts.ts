/** What a model's or an adapter's folder holds, from its headers: no weight is read. */
import { readBnbConfig, readQuantState } from '../io/bnb-checkpoint.js';
import { locate } from '../io/hub.js';
import { openModelFolder } from '../io/model-folder.js';
import { openAdapterWeights, readAdapterConfig } from '../io/peft.js';
import { readTrainingRecord } from '../io/training-record.js';
import { ConfigReader } from '../models/config-reader.js';
import { familyOf } from '../models/families/index.js';

export interface ModelFacts {
  type: 'model';
  family: string;
  layers: number;
  hiddenSize: number;
  intermediateSize: number;
  heads: number;
  kvHeads: number;
  headDim: number;
  vocabSize: number;
  tiedHead: boolean;
  storedIn: string;
  parameters: number;
  linearParameters: number;
  /** Of the weights alone, held as 16-bit numbers and as NF4 with double quantization. */
  bytesIn16Bit: number;
  bytesIn4Bit: number;
  /** Modules with one shape, [out, in]. */
  shapes: { module: string; shape: readonly number[]; count: number }[];
}

const blockSize = 64;
const nestedBlockSize = 256;

/** Packed codes, a byte a block, four bytes for 256 blocks. */
function fourBitBytes(elements: number): number {
  const blocks = Math.ceil(elements / blockSize);
  return Math.ceil(elements / 2) + blocks + 4 * Math.ceil(blocks / nestedBlockSize);
}

export async function modelFacts(directory: string): Promise<ModelFacts> {
  using folder = await openModelFolder(await locate(directory, 'model'));
  const family = familyOf(folder.config);
  const quantized = readBnbConfig(folder.config);
  const fields = new ConfigReader(folder.config);
  const config = family.config(fields);
  const { numLayers, numHeads, numKvHeads, hiddenSize, intermediateSize, headDim, vocabSize, tiedHead } = config;
  const facts: ModelFacts = {
    type: 'model',
    family: String(folder.config.model_type),
    layers: numLayers,
    hiddenSize,
    intermediateSize,
    heads: numHeads,
    kvHeads: numKvHeads,
    headDim,
    vocabSize,
    tiedHead,
    storedIn: quantized ? `bitsandbytes ${quantized.type}` : '',
    parameters: 0,
    linearParameters: 0,
    bytesIn16Bit: 0,
    bytesIn4Bit: 0,
    shapes: [],
  };
  const dtypes = new Set<string>();
  for (const { from, kind } of family.modules(config, folder.config)) {
    for (let layer = 0; layer < (from.includes('*') ? numLayers : 1); layer++) {
      const path = from.replace('*', String(layer));
      const weight = folder.entry(`${path}.weight`);
      const bias = folder.tensors.get(`${path}.bias`);
      dtypes.add(weight.fileDType);
      // A quantized weight is bytes in a row; its description has the shape.
      const shape = (quantized && (await readQuantState(folder, path))?.shape) ?? weight.shape;
      const [size, biasSize] = [product(shape), bias ? product(bias.shape) : 0];
      facts.parameters += size + biasSize;
      facts.bytesIn16Bit += 2 * (size + biasSize);
      facts.bytesIn4Bit += (kind === 'linear' ? fourBitBytes(size) : 2 * size) + 2 * biasSize;
      if (kind === 'linear') facts.linearParameters += size;
      const last = facts.shapes.at(-1);
      if (last?.module === from) last.count++;
      else facts.shapes.push({ module: from, shape, count: 1 });
    }
  }
  facts.storedIn ||= [...dtypes].join(', ');
  return facts;
}

export interface AdapterFacts {
  type: 'adapter';
  baseModel: string | undefined;
  r: number;
  alpha: number;
  dropout: number;
  targetModules: readonly string[] | string;
  modulesToSave: readonly string[];
  useRslora: boolean;
  useDora: boolean;
  /** Of prompts, where it was trained here. */
  template: string | undefined;
  tensors: number;
  parameters: number;
}

export async function adapterFacts(directory: string): Promise<AdapterFacts> {
  const { baseModel, r, alpha, dropout, targetModules, modulesToSave, useRslora, useDora } =
    await readAdapterConfig(directory);
  const file = await openAdapterWeights(directory);
  try {
    const shapes = [...file.tensors.values()].map(({ shape }) => product(shape));
    const record = await readTrainingRecord(directory);
    return {
      type: 'adapter',
      ...{ baseModel, r, alpha, dropout, targetModules, modulesToSave, useRslora, useDora },
      template: record?.template,
      tensors: shapes.length,
      parameters: shapes.reduce((a, b) => a + b, 0),
    };
  } finally {
    file.close();
  }
}

function product(shape: readonly number[]): number {
  return shape.reduce((a, b) => a * b, 1);
}
