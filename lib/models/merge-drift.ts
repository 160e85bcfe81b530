/** How far a merged model is from what it was made of, and whether rounding alone explains it. */
import { hiddenStates, logitsOf, type ModelCore } from './core.js';
import { disposeCore, loadCore } from './load.js';

/** Of logits of 16 ids spread over the vocabulary, at all places and over all of it, in the model's computeDtype. */
export interface Drift {
  /** The largest absolute difference between the model with its adapter and the merged one. */
  logitDrift: number;
  /** The largest absolute logit of the model with its adapter. */
  largestLogit: number;
  /** The largest absolute difference that the adapter makes; 0 without one. */
  adapterChange: number;
}

const probeLength = 16;

/**
 * Share of the largest logit. A 16-bit number is right to 2^-8 of itself (bf16), and each layer rounds again: on the way
 * to the logits that becomes a percent or two. Storing weights in 4 bits moves them by some tens of percent.
 */
const mostOfRounding = 0.05;

export async function measureDrift(
  core: ModelCore,
  adapter: string | undefined,
  folder: string,
  signal: AbortSignal | undefined,
): Promise<Drift> {
  const before = await probe(core, adapter);
  const base = adapter === undefined ? before : await probe(core, undefined);
  const { computeDtype, allowUnknownConfig } = core;
  const merged = await loadCore(folder, {
    quantization: undefined,
    storage: 'as-in-file',
    computeDtype,
    allowUnknownConfig,
    signal,
  });
  try {
    return {
      logitDrift: largest(before, await probe(merged, undefined)),
      largestLogit: largest(before, new Float32Array(before.length)),
      adapterChange: largest(before, base),
    };
  } finally {
    await disposeCore(merged);
  }
}

export function isRounding({ logitDrift, largestLogit }: Drift): boolean {
  return logitDrift <= mostOfRounding * largestLogit;
}

export function driftSentence(drift: Drift): string {
  const { logitDrift, largestLogit, adapterChange } = drift;
  const share = (100 * logitDrift) / largestLogit;
  const measured = `the merged model's logits differ by at most ${logitDrift.toPrecision(3)}, ${share.toPrecision(2)}% of the largest`;
  const effect = adapterChange > 0 ? `; the adapter moves them by ${adapterChange.toPrecision(3)}` : '';
  return isRounding(drift)
    ? `${measured}: good, rounding to 16 bits explains up to ${100 * mostOfRounding}%${effect}`
    : `${measured}: more than the ${100 * mostOfRounding}% that rounding to 16 bits explains${effect}: compare answers before you use it`;
}

function largest(a: Float32Array, b: Float32Array): number {
  return a.reduce((most, x, i) => Math.max(most, Math.abs(x - (b[i] as number))), 0);
}

async function probe(core: ModelCore, adapter: string | undefined): Promise<Float32Array> {
  const { vocabSize } = core.config;
  const tokens = Int32Array.from({ length: probeLength }, (_, i) => Math.floor(((i + 0.5) * vocabSize) / probeLength));
  const rows = { tokens, batch: 1, length: probeLength };
  using hidden = hiddenStates(core, undefined, rows, { adapter, checkpointing: 'none' });
  using logits = logitsOf(core, adapter, hidden);
  return logits.read();
}
