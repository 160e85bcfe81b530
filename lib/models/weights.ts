/** From a model folder to a decoder's weights: each tensor is read, and quantized at once, before the next is read. */
import { QLoRAError } from '../errors.js';
import { readBnbConfig } from '../io/bnb-checkpoint.js';
import type { ModelFolder } from '../io/model-folder.js';
import { Linear } from '../nn/linear.js';
import { cast } from '../ops/elementwise.js';
import { quantizeWeight } from '../ops/quantize.js';
import { Weight } from '../ops/weight.js';
import type { ResolvedQuantizeOptions } from '../quantization.js';
import { type FloatDType, type Stream, Tensor } from '../tensor.js';
import type { DecoderConfig, Family, ModuleRule } from './config.js';
import type { Block, DecoderWeights } from './decoder.js';
import { readQuantizedWeight } from './quantized-weight.js';

export interface WeightOptions {
  /** undefined: as the files have them, which a quantized checkpoint's always are. */
  quantization: (ResolvedQuantizeOptions & { skipModules: readonly string[] }) | undefined;
  /** 'masters' makes every weight f32, to be trained. */
  storage: 'as-in-file' | 'masters';
  signal?: AbortSignal;
  onProgress?: (done: number, total: number) => void;
}

export interface LoadedWeights {
  decoder: DecoderWeights;
  linears: readonly Linear[];
  /** Every tensor of the files that is held as it is, by name: what full fine-tuning trains and save() writes. */
  dense: ReadonlyMap<string, Tensor>;
  /** By their places in the decoder, as a family's rules name them. A tied head is there too: the embedding. */
  modules: ReadonlyMap<string, Tensor | Linear>;
  /** From a module's path in the files to its place. */
  places: ReadonlyMap<string, string>;
}

/** What files and PEFT call an output head that is the embedding. */
const tiedHeadPath = 'lm_head';

/** A module of one layer, with its number filled in. */
export interface Module {
  rule: ModuleRule;
  from: string;
  to: string;
}

export async function loadWeights(
  stream: Stream,
  folder: ModelFolder,
  family: Family,
  config: DecoderConfig,
  given: WeightOptions,
): Promise<LoadedWeights> {
  // A checkpoint that is quantized already keeps what it left in 16 bits so.
  const stored = readBnbConfig(folder.config);
  if (stored && given.storage === 'masters') {
    throw new QLoRAError(
      'ERR_QLORA_OPTION_CONFLICT',
      `${folder.directory}: lora: 'none' trains the weights themselves, and these are quantized`,
      { hint: 'Take the model in 16 bits, or train an adapter.' },
    );
  }
  const options = stored ? { ...given, quantization: undefined } : given;
  const modules = listModules(family, config, folder.config);
  checkNames(folder, family, modules, config);
  const dense = new Map<string, Tensor>();
  const linears: Linear[] = [];
  const loaded = new Map<string, Tensor | Linear>();
  try {
    for (const [index, module] of modules.entries()) {
      options.signal?.throwIfAborted();
      options.onProgress?.(index, modules.length);
      if (module.rule.kind === 'linear') {
        const linear = await loadLinear(stream, folder, module, linears.length, dense, options);
        linears.push(linear);
        loaded.set(module.to, linear);
      } else {
        loaded.set(module.to, await loadDense(stream, folder, `${module.from}.weight`, dense, options));
      }
    }
    options.onProgress?.(modules.length, modules.length);
    const places = new Map(modules.map(({ from, to }) => [from, to]));
    if (config.tiedHead) {
      loaded.set('head', loaded.get('embedding') as Tensor);
      places.set(tiedHeadPath, 'head');
    }
    const decoder = assemble(config, loaded);
    checkShapes(config, decoder);
    return { decoder, linears, dense, modules: loaded, places };
  } catch (error) {
    for (const linear of linears) linear.dispose();
    for (const tensor of dense.values()) tensor.dispose();
    throw error;
  }
}

export function listModules(
  family: Family,
  config: DecoderConfig,
  fields: Readonly<Record<string, unknown>>,
): Module[] {
  return family.modules(config, fields).flatMap((rule) => {
    if (!rule.from.includes('*')) return [{ rule, from: rule.from, to: rule.to }];
    return Array.from({ length: config.numLayers }, (_, i) => ({
      rule,
      from: rule.from.replace('*', String(i)),
      to: rule.to.replace('*', String(i)),
    }));
  });
}

/** Every tensor that the decoder needs is there, and none is that it would leave unused. */
function checkNames(folder: ModelFolder, family: Family, modules: readonly Module[], config: DecoderConfig): void {
  const expected = new Set<string>();
  for (const { rule, from } of modules) {
    expected.add(`${from}.weight`);
    if (rule.bias) expected.add(`${from}.bias`);
  }
  for (const name of expected) {
    if (folder.tensors.has(name)) continue;
    throw new QLoRAError('ERR_QLORA_TENSOR_NOT_FOUND', `${folder.directory}: the files hold no tensor '${name}'`, {
      hint: 'The folder is incomplete, or config.json belongs to another model.',
      detail: { name },
    });
  }
  const tiedCopy = (name: string) => config.tiedHead && name === `${tiedHeadPath}.weight`;
  for (const name of folder.tensors.keys()) {
    // A quantized layer's parts stand beside its weight: weight.absmax, weight.quant_map and so on; SCB, weight_format.
    const owner = name.replace(/\.(weight\..*|SCB|weight_format)$/, '.weight');
    if (expected.has(owner) || tiedCopy(name) || family.ignored.some((pattern) => pattern.test(name))) continue;
    throw new QLoRAError(
      'ERR_QLORA_TENSOR_UNEXPECTED',
      `${folder.directory}: the files hold a tensor '${name}' that a ${family.modelTypes[0]} model of this config.json does not have`,
      { hint: 'Leaving it out would compute something else; config.json and the files must agree.', detail: { name } },
    );
  }
}

/** A tensor as the file has it, or in fp32 where it will be trained; its values are checked to be finite. */
async function loadDense(
  stream: Stream,
  folder: ModelFolder,
  name: string,
  dense: Map<string, Tensor>,
  options: WeightOptions,
): Promise<Tensor> {
  const tensor = await readFloat(stream, folder, name);
  if (options.storage === 'as-in-file' || tensor.dtype === 'f32') {
    dense.set(name, tensor);
    return tensor;
  }
  const master = cast(undefined, tensor, 'f32', 'weights');
  tensor.dispose();
  dense.set(name, master);
  return master;
}

async function readFloat(stream: Stream, folder: ModelFolder, name: string): Promise<Tensor> {
  const { dtype, fileDType, shape } = folder.entry(name);
  if (dtype !== 'f32' && dtype !== 'bf16' && dtype !== 'f16') {
    throw new QLoRAError(
      'ERR_QLORA_DTYPE',
      `${folder.directory}: '${name}' must be F32, BF16 or F16, got ${fileDType}`,
      {
        hint: 'Quantized checkpoints of other kinds than those of bitsandbytes cannot be loaded; take the original model.',
      },
    );
  }
  const tensor = new Tensor(stream, dtype satisfies FloatDType, shape, 'weights');
  try {
    await folder.read(name, tensor);
    return tensor;
  } catch (error) {
    tensor.dispose();
    throw error;
  }
}

async function loadLinear(
  stream: Stream,
  folder: ModelFolder,
  module: Module,
  index: number,
  dense: Map<string, Tensor>,
  options: WeightOptions,
): Promise<Linear> {
  const name = `${module.from}.weight`;
  const { quantization } = options;
  // The bias first: what it fails with leaves nothing behind, since whoever calls frees `dense`.
  const bias = module.rule.bias ? await loadDense(stream, folder, `${module.from}.bias`, dense, options) : undefined;
  const stored = await readQuantizedWeight(stream, folder, module.from);
  if (stored) return new Linear(module.from, index, stored, bias);
  const skipped = quantization?.skipModules.some((m: string) => module.from === m || module.from.endsWith(`.${m}`));
  if (!quantization || skipped) {
    return new Linear(module.from, index, Weight.dense(await loadDense(stream, folder, name, dense, options)), bias);
  }
  using tensor = await readFloat(stream, folder, name);
  return new Linear(module.from, index, await quantizeWeight(tensor, quantization), bias);
}

/** The decoder's weights from modules by their places. */
export function assemble(config: DecoderConfig, loaded: ReadonlyMap<string, Tensor | Linear>): DecoderWeights {
  const tensor = (to: string) => loaded.get(to) as Tensor;
  const layers = Array.from({ length: config.numLayers }, (_, i): Block => {
    const linear = (name: string) => loaded.get(`layers.${i}.${name}`) as Linear;
    return {
      attentionNorm: tensor(`layers.${i}.attentionNorm`),
      q: linear('q'),
      k: linear('k'),
      v: linear('v'),
      o: linear('o'),
      mlpNorm: tensor(`layers.${i}.mlpNorm`),
      gate: linear('gate'),
      up: linear('up'),
      down: linear('down'),
    };
  });
  return { embedding: tensor('embedding'), layers, norm: tensor('norm'), head: Weight.dense(tensor('head')) };
}

/** config.json and the files agree on every size. */
function checkShapes(config: DecoderConfig, weights: DecoderWeights): void {
  const { hiddenSize: C, vocabSize: V, intermediateSize: F, headDim: D } = config;
  const [Q, KV] = [config.numHeads * D, config.numKvHeads * D];
  const check = (what: string, got: readonly number[], expected: readonly number[]) => {
    if (got.length === expected.length && got.every((n, i) => n === expected[i])) return;
    throw new QLoRAError(
      'ERR_QLORA_SHAPE',
      `${what}: config.json asks for shape [${expected.join(', ')}], the files have [${got.join(', ')}]`,
      { hint: 'config.json belongs to another model, or the files are damaged.' },
    );
  };
  const checkLinear = ({ path, weight, bias }: Linear, N: number, K: number) => {
    check(`${path}.weight`, [weight.N, weight.K], [N, K]);
    if (bias) check(`${path}.bias`, bias.shape, [N]);
  };
  check('embedding', weights.embedding.shape, [V, C]);
  check('output head', [weights.head.N, weights.head.K], [V, C]);
  check('last norm', weights.norm.shape, [C]);
  for (const [i, block] of weights.layers.entries()) {
    check(`layer ${i}, attention norm`, block.attentionNorm.shape, [C]);
    check(`layer ${i}, mlp norm`, block.mlpNorm.shape, [C]);
    checkLinear(block.q, Q, C);
    checkLinear(block.k, KV, C);
    checkLinear(block.v, KV, C);
    checkLinear(block.o, C, Q);
    checkLinear(block.gate, F, C);
    checkLinear(block.up, F, C);
    checkLinear(block.down, C, F);
  }
}
