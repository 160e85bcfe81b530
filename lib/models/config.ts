/** What a decoder is, as data: a family turns its config.json into this, and decoder.ts asks nothing else. */
import type { Activation } from '../ops/glu.js';
import type { ConfigReader } from './config-reader.js';
import type { Rope } from './rope.js';

export interface DecoderConfig {
  vocabSize: number;
  hiddenSize: number;
  intermediateSize: number;
  numLayers: number;
  numHeads: number;
  /** Each serves numHeads / numKvHeads query heads. */
  numKvHeads: number;
  headDim: number;
  /** Root-mean-square norm; the weight is added to `offset` (1 for Gemma). */
  norm: { eps: number; offset: number };
  rope: Rope;
  /** windows: how many keys a query of each layer sees at most, 0 for all of them; left out where no layer has one. */
  attention: { scale: number; windows?: readonly number[] };
  activation: Activation;
  /** The output head is the embedding table. */
  tiedHead: boolean;
}

/**
 * One module of the files and where it belongs in the decoder. `*` stands for the layer's number. A `linear` may be
 * quantized and adapted and may have a bias; `from` is its path in PEFT's and bitsandbytes' names too.
 */
export interface ModuleRule {
  from: string;
  to: string;
  kind: 'linear' | 'norm' | 'embedding' | 'head';
  bias?: boolean;
}

export interface Family {
  modelTypes: readonly string[];
  config(fields: ConfigReader): DecoderConfig;
  modules(config: DecoderConfig, fields: Readonly<Record<string, unknown>>): ModuleRule[];
  /** Tensors that some files hold and nothing needs. */
  ignored: readonly RegExp[];
}
