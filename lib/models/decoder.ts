/**
 * A decoder-only transformer as its DecoderConfig describes it. Shapes: B rows, T tokens a row, C hidden size, H query
 * heads, G key-value heads, D head size, V vocabulary, S places of the cache, R positions whose hidden states are
 * wanted.
 */
import { checkpoint, type Tape } from '../autograd.js';
import { Linear, type Pass } from '../nn/linear.js';
import { attention } from '../ops/attention.js';
import { embedding } from '../ops/embedding.js';
import { glu } from '../ops/glu.js';
import { type NeftuneKey, neftune } from '../ops/neftune.js';
import { reshape } from '../ops/reshape.js';
import { rmsNorm } from '../ops/rms-norm.js';
import { type RopeTable, rope, ropeAppend } from '../ops/rope.js';
import { selectRows } from '../ops/select-rows.js';
import type { Weight } from '../ops/weight.js';
import type { FloatDType, Tensor } from '../tensor.js';
import { ActivationOffloading } from './activation-offloading.js';
import type { DecoderConfig } from './config.js';
import type { KeyValueCache } from './key-value-cache.js';

export interface Block {
  attentionNorm: Tensor;
  q: Linear;
  k: Linear;
  v: Linear;
  o: Linear;
  mlpNorm: Tensor;
  gate: Linear;
  up: Linear;
  down: Linear;
}

export interface DecoderWeights {
  /** [V, C] */
  embedding: Tensor;
  layers: readonly Block[];
  norm: Tensor;
  /** [V, C]; the embedding itself where they are tied. */
  head: Weight;
}

export interface DecoderInput {
  /** i32 [B, T] */
  tokens: Tensor;
  /** cos and sin of each token's position, [B T, rotaryDim / 2] */
  rope: RopeTable;
  /** i32 [B, T]: tokens attend within equal ids only; left out where each row is one sequence. */
  segments?: Tensor;
  /** It gets the keys and values of the tokens; to be advanced by T after that. */
  cache?: KeyValueCache;
  /** i32 [R], ascending: the positions whose hidden states are wanted; left out where all are. */
  wanted?: Tensor;
  /** Noise on the embeddings: f32 [B, T], the magnitude of each token's. */
  noise?: NeftuneKey & { magnitude: Tensor };
}

export interface DecoderPass extends Pass {
  computeDtype: FloatDType;
  /**
   * 'blocks' keeps only each block's input and computes the rest again in the backward pass; a number does so for the
   * first so many blocks: the others are done with before the backward pass comes to them.
   */
  checkpointing: 'none' | 'blocks' | number;
  /** Where these inputs are meanwhile; 'host' needs a device. Default 'device'. */
  keptInputs?: 'device' | 'host';
  /** While training: NEFTune's alpha, and the key of this micro-step's noise. */
  neftune?: { alpha: number; seed: number; microStep: number };
}

/** Hidden states after the last norm, [B T, C], or [R, C] of those that are wanted. */
export function decode(
  tape: Tape | undefined,
  config: DecoderConfig,
  weights: DecoderWeights,
  input: DecoderInput,
  pass: DecoderPass,
): Tensor {
  const { tokens, noise, wanted } = input;
  const [B, T] = tokens.shape as [number, number];
  const embedded = embedding(tape, weights.embedding, tokens, { dtype: pass.computeDtype });
  const start = noise ? neftune(tape, embedded, noise.magnitude, noise) : embedded;
  let x = reshape(tape, start, [B * T, config.hiddenSize]);
  embedded.dispose();
  start.dispose();
  pass.inspect?.(weights.embedding, x);
  const { checkpointing } = pass;
  const again = checkpointing === 'none' ? 0 : checkpointing === 'blocks' ? weights.layers.length : checkpointing;
  const offloading = tape && pass.keptInputs === 'host' ? new ActivationOffloading(again) : undefined;
  weights.layers.forEach((block, layer) => {
    const run = (inner: Tape | undefined, h: Tensor) => runBlock(inner, config, block, layer, h, input, pass);
    const needs = [input.rope.cos, input.rope.sin, input.segments, wanted].filter((t) => t !== undefined);
    const y = tape && layer < again ? checkpoint(tape, x, offloading?.around(x, run) ?? run, needs) : run(tape, x);
    x.dispose();
    x = y;
  });
  using last = x;
  const y = rmsNorm(tape, last, weights.norm, config.norm.eps, config.norm.offset);
  pass.inspect?.(weights.norm, y);
  return y;
}

function runBlock(
  tape: Tape | undefined,
  config: DecoderConfig,
  block: Block,
  layer: number,
  x: Tensor,
  input: DecoderInput,
  pass: DecoderPass,
): Tensor {
  const { eps, offset } = config.norm;
  using normed = rmsNorm(tape, x, block.attentionNorm, eps, offset);
  pass.inspect?.(block.attentionNorm, normed);
  using attended = attend(tape, config, block, layer, normed, input, pass);
  const { wanted } = input;
  if (!wanted || layer < config.numLayers - 1) return afterAttention(tape, config, block, x, attended, pass);
  // What follows attention is position by position: in the last layer only where somebody looks.
  using rows = selectRows(tape, x, wanted);
  using attendedRows = selectRows(tape, attended, wanted);
  return afterAttention(tape, config, block, rows, attendedRows, pass);
}

/** x [.., C] and what its tokens attended to, [.., H D], to the block's output [.., C] */
function afterAttention(
  tape: Tape | undefined,
  config: DecoderConfig,
  block: Block,
  x: Tensor,
  attended: Tensor,
  pass: DecoderPass,
): Tensor {
  const { eps, offset } = config.norm;
  using h = block.o.addTo(tape, x, attended, pass);
  using mlpInput = rmsNorm(tape, h, block.mlpNorm, eps, offset);
  pass.inspect?.(block.mlpNorm, mlpInput);
  using gated = gatedUnits(tape, config, block, mlpInput, pass);
  return block.down.addTo(tape, h, gated, pass);
}

/** [B T, C] to [B T, H D] */
function attend(
  tape: Tape | undefined,
  config: DecoderConfig,
  block: Block,
  layer: number,
  x: Tensor,
  { tokens, rope: table, segments, cache }: DecoderInput,
  pass: DecoderPass,
): Tensor {
  const { numHeads: H, numKvHeads: G, headDim: D } = config;
  const [B, T] = tokens.shape as [number, number];
  const split = (projected: Tensor, heads: number) => {
    using flat = projected;
    return reshape(tape, flat, [B, T, heads, D]);
  };
  const turned = (projected: Tensor, heads: number) => {
    using x = split(projected, heads);
    return rope(tape, x, table);
  };
  const [flatQ, flatK, flatV] = Linear.forwardAll(tape, [block.q, block.k, block.v] as const, x, pass);
  using v = split(flatV, G);
  const { scale, windows } = config.attention;
  const options = { scale, causal: true, window: windows?.[layer] };
  if (cache) {
    const { keys, values } = cache.layer(layer);
    using still = split(flatQ, H);
    using k = split(flatK, G);
    using q = ropeAppend(still, k, v, table, { keys, values }, cache.ends);
    using out = attention(tape, q, keys, values, { ...options, pastLength: cache.ends });
    return reshape(tape, out, [B * T, H * D]);
  }
  using q = turned(flatQ, H);
  using k = turned(flatK, G);
  using out = attention(tape, q, k, v, { ...options, querySegments: segments, keySegments: segments });
  pass.inspect?.(`the attention of layer ${layer}`, out);
  return reshape(tape, out, [B * T, H * D]);
}

/** [.., C] to [.., F], what `down` is given */
function gatedUnits(tape: Tape | undefined, config: DecoderConfig, block: Block, x: Tensor, pass: Pass): Tensor {
  const [ofGate, ofUp] = Linear.forwardAll(tape, [block.gate, block.up] as const, x, pass);
  using gate = ofGate;
  using up = ofUp;
  const gated = glu(tape, gate, up, config.activation);
  pass.inspect?.(`the activation before ${block.down.path}`, gated);
  return gated;
}
