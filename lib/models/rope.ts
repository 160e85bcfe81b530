/**
 * Rotary position embedding: the inverse frequencies of every scaling that a config.json may name. Dimension pair i of R
 * turns by position * frequency[i]; without scaling frequency[i] = base^(-2i/R). Computed in fp32 where transformers
 * does, so that angles at large positions agree.
 *
 * Sources: RoFormer (Su et al., 2021); position interpolation (Chen et al., 2023); YaRN and dynamic NTK (Peng et al.,
 * 2023); LongRoPE (Ding et al., 2024); llama3 as published with Llama 3.1.
 */

export type RopeScaling =
  | { type: 'default' }
  | { type: 'linear'; factor: number }
  /** The base grows with the sequence once it is longer than maxPositions. */
  | { type: 'dynamic'; factor: number; maxPositions: number }
  | {
      type: 'yarn';
      factor: number;
      originalMaxPositions: number;
      attentionFactor?: number;
      mscale?: number;
      mscaleAllDim?: number;
      betaFast: number;
      betaSlow: number;
      truncate: boolean;
    }
  /** One factor a dimension pair; the long ones for sequences longer than originalMaxPositions. */
  | {
      type: 'longrope';
      shortFactor: readonly number[];
      longFactor: readonly number[];
      originalMaxPositions: number;
      factor: number;
      attentionFactor?: number;
    }
  | {
      type: 'llama3';
      factor: number;
      lowFreqFactor: number;
      highFreqFactor: number;
      originalMaxPositions: number;
    };

export interface Rope {
  base: number;
  /** Dimensions of a head that turn; even. */
  rotaryDim: number;
  scaling: RopeScaling;
}

export interface RopeFrequencies {
  /** [rotaryDim / 2], radians a position. */
  inverseFrequencies: Float32Array;
  /** cos and sin are multiplied by it. */
  factor: number;
}

const fround = Math.fround;

/** Whether sequences of different length turn at different rates. */
export function dependsOnLength({ scaling }: Rope): boolean {
  return scaling.type === 'dynamic' || scaling.type === 'longrope';
}

/** @param sequenceLength of the sequence at hand, the keys in its cache included */
export function ropeFrequencies(rope: Rope, sequenceLength: number): RopeFrequencies {
  const { base, rotaryDim, scaling } = rope;
  switch (scaling.type) {
    case 'default':
      return { inverseFrequencies: plain(base, rotaryDim), factor: 1 };
    case 'linear':
      return { inverseFrequencies: plain(base, rotaryDim).map((f) => f / scaling.factor), factor: 1 };
    case 'dynamic': {
      const { factor, maxPositions } = scaling;
      const length = Math.max(sequenceLength, maxPositions);
      const stretched = base * ((factor * length) / maxPositions - (factor - 1)) ** (rotaryDim / (rotaryDim - 2));
      return { inverseFrequencies: plain(stretched, rotaryDim), factor: 1 };
    }
    case 'longrope': {
      const { shortFactor, longFactor, originalMaxPositions, factor } = scaling;
      const factors = sequenceLength > originalMaxPositions ? longFactor : shortFactor;
      const inferred = factor <= 1 ? 1 : Math.sqrt(1 + Math.log(factor) / Math.log(originalMaxPositions));
      return {
        inverseFrequencies: periods(base, rotaryDim).map((p, i) => 1 / fround(fround(factors[i] as number) * p)),
        factor: scaling.attentionFactor ?? inferred,
      };
    }
    case 'llama3':
      return { inverseFrequencies: plain(base, rotaryDim).map((f) => llama3(f, scaling)), factor: 1 };
    case 'yarn':
      return yarn(base, rotaryDim, scaling);
  }
}

/** base^(2i/R) */
function periods(base: number, rotaryDim: number): Float32Array {
  return Float32Array.from({ length: rotaryDim / 2 }, (_, i) => base ** fround((2 * i) / rotaryDim));
}

function plain(base: number, rotaryDim: number): Float32Array {
  return periods(base, rotaryDim).map((p) => 1 / p);
}

/** Long waves are stretched, short ones kept, those between blended. */
function llama3(frequency: number, s: Extract<RopeScaling, { type: 'llama3' }>): number {
  const wavesInContext = (s.originalMaxPositions * frequency) / (2 * Math.PI);
  if (wavesInContext > s.highFreqFactor) return frequency;
  if (wavesInContext < s.lowFreqFactor) return frequency / s.factor;
  const keep = (wavesInContext - s.lowFreqFactor) / (s.highFreqFactor - s.lowFreqFactor);
  return ((1 - keep) * frequency) / s.factor + keep * frequency;
}

/** NTK by parts: pairs below `low` keep their frequency, those above `high` are interpolated, a ramp between. */
function yarn(base: number, R: number, s: Extract<RopeScaling, { type: 'yarn' }>): RopeFrequencies {
  const pairWithRotations = (n: number) =>
    (R * Math.log(s.originalMaxPositions / (n * 2 * Math.PI))) / (2 * Math.log(base));
  const ends = [pairWithRotations(s.betaFast), pairWithRotations(s.betaSlow)] as const;
  const [low, high] = s.truncate ? [Math.floor(ends[0]), Math.ceil(ends[1])] : ends;
  const from = Math.max(low, 0);
  const to = Math.min(high, R - 1);
  const width = to === from ? 0.001 : to - from;
  const inverseFrequencies = periods(base, R).map((period, i) => {
    const interpolated = Math.min(1, Math.max(0, (i - from) / width));
    return interpolated / (s.factor * period) + (1 - interpolated) / period;
  });
  const magnitude = (mscale: number) => (s.factor <= 1 ? 1 : 0.1 * mscale * Math.log(s.factor) + 1);
  const inferred = s.mscale && s.mscaleAllDim ? magnitude(s.mscale) / magnitude(s.mscaleAllDim) : magnitude(1);
  return { inverseFrequencies, factor: s.attentionFactor ?? inferred };
}
