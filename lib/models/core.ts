/** What QuantizedModel, generation and training share: the weights, and passes through them. */

import type { Tape } from '../autograd.js';
import { QLoRAError } from '../errors.js';
import type { GenerationConfig } from '../io/generation-config.js';
import type { ModelFolder } from '../io/model-folder.js';
import type { TrainingRecord } from '../io/training-record.js';
import type { Linear } from '../nn/linear.js';
import type { FrozenLora } from '../nn/lora.js';
import { matmul } from '../ops/matmul.js';
import { type FloatDType, type Stream, Tensor } from '../tensor.js';
import type { Tokenizer } from '../tokenizer/tokenizer.js';
import type { DecoderConfig, Family } from './config.js';
import { type DecoderPass, type DecoderWeights, decode } from './decoder.js';
import type { KeyValueCache } from './key-value-cache.js';
import type { LoraAdapter } from './lora-adapter.js';
import { noiseMagnitudes, noiseStream } from './neftune.js';
import { RopeInput } from './rope-input.js';
import type { LoadedWeights } from './weights.js';

export interface ModelCore {
  readonly directory: string;
  /** Open as long as the model is: PiSSA starts from the weights before they were quantized. */
  readonly folder: ModelFolder;
  /** The folder as it was given, or owner/name of the hub. */
  readonly name: string;
  readonly stream: Stream;
  readonly family: Family;
  readonly config: DecoderConfig;
  /** config.json as it was read. */
  readonly configJson: Readonly<Record<string, unknown>>;
  /** Fields of it that were allowed though nothing knows them. */
  readonly allowUnknownConfig: readonly string[];
  readonly generation: GenerationConfig;
  readonly weights: LoadedWeights;
  readonly computeDtype: FloatDType;
  readonly tokenizer: Tokenizer | undefined;
  /** Of a model that an adapter was merged into, or that was trained whole: how that was done. */
  training: TrainingRecord | undefined;
  readonly adapters: Map<string, LoraAdapter>;
}

/** Rows of ids, [batch, length] row-major, padded on the right. */
export interface TokenRows {
  tokens: Int32Array;
  batch: number;
  length: number;
  /** Default: 0, 1, ... in each row, after what the cache holds of it. */
  positions?: Int32Array;
  /** Below 0 in padding. Default: each row is one sequence. */
  segmentIds?: Int32Array;
  /** Flat positions, ascending, whose hidden states are wanted: the others are spared what they can. Default: all. */
  wanted?: Int32Array;
}

/** An id that the embedding does not have would read outside of it: refused before anything is enqueued. */
export function checkIds(ids: ArrayLike<number>, vocabSize: number, what = 'inputIds'): void {
  for (let i = 0; i < ids.length; i++) {
    const id = ids[i] as number;
    if (Number.isInteger(id) && id >= 0 && id < vocabSize) continue;
    throw new QLoRAError(
      'ERR_QLORA_TOKEN_ID',
      `${what}[${i}] must be an integer from 0 to ${vocabSize - 1} (the vocabulary has ${vocabSize} entries), got ${id}`,
      { hint: 'Was it made by the tokenizer of this model?', detail: { index: i, id, vocabSize } },
    );
  }
}

/** Throws where the adapter in use was removed meanwhile. */
export function checkAdapter(core: ModelCore, adapter: string | undefined): void {
  if (adapter === undefined || core.adapters.has(adapter)) return;
  throw new QLoRAError('ERR_QLORA_ADAPTER_UNKNOWN', `adapter '${adapter}' was removed while it was in use`, {
    hint: 'Let what uses an adapter finish before removeLora().',
  });
}

/** The hidden states after the last norm, of the wanted positions or of all, [positions, hiddenSize]. */
export function hiddenStates(
  core: ModelCore,
  tape: Tape | undefined,
  rows: TokenRows,
  pass: Omit<DecoderPass, 'computeDtype'>,
  cache?: KeyValueCache,
): Tensor {
  const { batch, length } = rows;
  checkAdapter(core, pass.adapter);
  using tokens = Tensor.from(core.stream, rows.tokens, [batch, length]);
  using segments = rows.segmentIds && Tensor.from(core.stream, rows.segmentIds, [batch, length]);
  const fewer = rows.wanted && rows.wanted.length < batch * length ? rows.wanted : undefined;
  using wanted = fewer && Tensor.from(core.stream, fewer, [fewer.length]);
  const { neftune } = pass;
  using magnitude =
    neftune && Tensor.from(core.stream, noiseMagnitudes(neftune.alpha, core.config.hiddenSize, rows), [batch, length]);
  const noise = neftune && magnitude && { magnitude, seed: neftune.seed, stream: noiseStream(neftune.microStep) };
  const follow = (_: unknown, i: number) => (cache?.lengths[Math.floor(i / length)] ?? 0) + (i % length);
  const positions = rows.positions ?? Int32Array.from({ length: batch * length }, follow);
  using rope = new RopeInput(core.stream, core.config.rope, positions.length);
  rope.write(positions, length);
  const input = { tokens, rope, segments, cache, wanted, noise };
  const { computeDtype } = core;
  const hidden = decode(tape, core.config, decoderOf(core, pass.adapter), input, { ...pass, computeDtype });
  cache?.advance(length);
  return hidden;
}

/** An adapter for passes that do not train it; disposing of it leaves the adapter itself alone. */
export class FrozenAdapter implements Disposable {
  readonly layers = new Map<Linear, FrozenLora>();

  constructor(core: ModelCore, adapter: string | undefined) {
    if (adapter === undefined) return;
    for (const linear of core.weights.linears) {
      const lora = linear.adapters.get(adapter);
      if (lora) this.layers.set(linear, lora.frozen(linear, core.computeDtype));
    }
  }

  [Symbol.dispose](): void {
    for (const { A, B, magnitude, norm } of this.layers.values()) {
      for (const t of [A, B, magnitude, norm]) t?.dispose();
    }
  }
}

/** The weights that a pass with this adapter goes through: the model's, but for modules that the adapter trained whole. */
export function decoderOf(core: ModelCore, adapter: string | undefined): DecoderWeights {
  return (adapter === undefined ? undefined : core.adapters.get(adapter)?.whole.decoder) ?? core.weights.decoder;
}

/** Logits of `hidden` [M, C], which a pass with this adapter made, fp32 [M, V]. */
export function logitsOf(core: ModelCore, adapter: string | undefined, hidden: Tensor): Tensor {
  return matmul(undefined, hidden, decoderOf(core, adapter).head, undefined, 'f32');
}

/** Every id that ends a text: generation_config.json's, else config.json's, and the tokenizer's. */
export function endTokens({ generation, configJson, tokenizer }: ModelCore): ReadonlySet<number> {
  const own = generation.eosTokenIds.length ? generation.eosTokenIds : [configJson.eos_token_id].flat();
  return new Set([...own, tokenizer?.eosTokenId].filter((id): id is number => typeof id === 'number'));
}
