/** Rotary embedding as config.json describes it, in the fields of transformers 4 and of transformers 5. */
import { QLoRAError } from '../errors.js';
import type { ConfigReader } from './config-reader.js';
import type { Rope, RopeScaling } from './rope.js';

const types = ['default', 'linear', 'dynamic', 'yarn', 'longrope', 'su', 'llama3'] as const;

/** @param maxPositions the model's own max_position_embeddings */
export function readRope(fields: ConfigReader, headDim: number, maxPositions: number): Rope {
  // transformers 5 has rope_parameters with the base in it; 4 has rope_theta, and rope_scaling where there is one.
  const scaling = fields.object('rope_parameters') ?? fields.object('rope_scaling');
  fields.skip('rope_scaling', 'rope_parameters');
  const ownBase = fields.number('rope_theta', 10000);
  const base = scaling?.number('rope_theta', ownBase) ?? ownBase;
  const ownShare = fields.number('partial_rotary_factor', 1);
  const share = scaling?.number('partial_rotary_factor', ownShare) ?? ownShare;
  const ownOriginal = fields.has('original_max_position_embeddings')
    ? fields.count('original_max_position_embeddings')
    : undefined;
  const rope = {
    base,
    rotaryDim: Math.trunc(headDim * share),
    scaling: scaling ? readScaling(scaling, maxPositions, ownOriginal) : ({ type: 'default' } as const),
  };
  checkFactors(rope);
  return rope;
}

function checkFactors({ scaling, rotaryDim }: Rope): void {
  if (scaling.type !== 'longrope') return;
  for (const [name, factors] of [
    ['short_factor', scaling.shortFactor],
    ['long_factor', scaling.longFactor],
  ] as const) {
    if (factors.length === rotaryDim / 2) continue;
    throw new QLoRAError(
      'ERR_QLORA_CONFIG_INVALID',
      `config.json: ${name} must have ${rotaryDim / 2} numbers, one a pair of rotated dimensions, got ${factors.length}`,
      { hint: 'config.json is damaged, or belongs to another model.' },
    );
  }
}

function readScaling(fields: ConfigReader, maxPositions: number, ownOriginal: number | undefined): RopeScaling {
  const type = fields.string('rope_type', types, fields.string('type', types, 'default'));
  const optional = (name: string) => (fields.has(name) ? fields.number(name) : undefined);
  const originalMaxPositions = () => ownOriginal ?? fields.count('original_max_position_embeddings', maxPositions);
  switch (type) {
    case 'default':
      return { type };
    case 'linear':
      return { type, factor: fields.number('factor') };
    case 'dynamic':
      fields.skip('original_max_position_embeddings');
      return { type, factor: fields.number('factor'), maxPositions };
    case 'llama3':
      return {
        type,
        factor: fields.number('factor'),
        lowFreqFactor: fields.number('low_freq_factor'),
        highFreqFactor: fields.number('high_freq_factor'),
        originalMaxPositions: originalMaxPositions(),
      };
    case 'yarn': {
      const original = originalMaxPositions();
      return {
        type,
        factor: fields.number('factor', maxPositions / original),
        originalMaxPositions: original,
        attentionFactor: optional('attention_factor'),
        mscale: optional('mscale'),
        mscaleAllDim: optional('mscale_all_dim'),
        betaFast: fields.number('beta_fast', 32),
        betaSlow: fields.number('beta_slow', 1),
        truncate: fields.boolean('truncate', true),
      };
    }
    case 'longrope':
    case 'su': {
      const original = originalMaxPositions();
      fields.skip('original_max_position_embeddings');
      return {
        type: 'longrope',
        shortFactor: fields.numbers('short_factor'),
        longFactor: fields.numbers('long_factor'),
        originalMaxPositions: original,
        factor: fields.number('factor', maxPositions / original),
        attentionFactor: optional('attention_factor'),
      };
    }
  }
}
