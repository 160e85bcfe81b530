/** Adapters that start from the largest singular values of the weights: PiSSA. */
import { QLoRAError } from '../errors.js';
import type { AdapterConfig } from '../io/peft.js';
import type { SafetensorsFile } from '../io/safetensors.js';
import type { Linear } from '../nn/linear.js';
import type { LoraLinear } from '../nn/lora.js';
import { cast } from '../ops/elementwise.js';
import { selection } from '../ops/low-rank.js';
import { dequantizeWeight } from '../ops/quantize.js';
import { Weight } from '../ops/weight.js';
import { type FloatDType, Tensor } from '../tensor.js';
import type { ModelCore } from './core.js';

/** @throws ERR_QLORA_OPTION_CONFLICT */
export function refuseWithDora(useDora: boolean | undefined): void {
  if (!useDora) return;
  throw new QLoRAError('ERR_QLORA_OPTION_CONFLICT', "init 'pissa' does not go with useDora", {
    hint: 'Leave one of them out.',
  });
}

/**
 * The weight of a layer as it was before it was quantized, f32 [N, K]. Of a checkpoint that was quantized already, what
 * its codes stand for. What fails to be read is told by whatever uses the result.
 */
export function originalWeight(core: ModelCore, { path, weight }: Linear): Tensor {
  const name = `${path}.weight`;
  const dtype = core.folder.tensors.get(name)?.dtype;
  const isFloat = dtype === 'f32' || dtype === 'bf16' || dtype === 'f16';
  if (weight.isDense || !isFloat) return dequantizeWeight(weight, 'f32');
  using stored = new Tensor(core.stream, dtype satisfies FloatDType, [weight.N, weight.K], 'scratch');
  core.folder.read(name, stored).catch(() => {});
  return cast(undefined, stored, 'f32');
}

/** The configuration of a plain adapter of twice the rank that computes the same over the whole weights. */
export function doubled(config: AdapterConfig): AdapterConfig {
  // The scale, alpha / r or alpha / sqrt(r), stays.
  const alphaFactor = config.useRslora ? Math.SQRT2 : 2;
  const times = (values: Readonly<Record<string, number>>, factor: number) =>
    Object.fromEntries(Object.entries(values).map(([key, value]) => [key, value * factor]));
  return {
    ...config,
    r: config.r * 2,
    alpha: config.alpha * alphaFactor,
    rankPattern: times(config.rankPattern, 2),
    alphaPattern: times(config.alphaPattern, alphaFactor),
  };
}

/** Takes A and B out of the [A; A0] and [B, -B0] that a file holds, bit for bit; the start is made again, not read. */
export async function restorePrincipal(
  file: SafetensorsFile,
  keys: { A: string; B: string },
  { A, B, r, outFeatures }: LoraLinear,
): Promise<void> {
  await file.readFinitePart(keys.A, A, 0);
  using both = new Tensor(B.stream, 'f32', [outFeatures, 2 * r], 'adapters');
  const read = file.readFinite(keys.B, both);
  using first = selection(B, [r, 2 * r], 0, 1);
  B.stream.run('matmulForward', both, ...Weight.dense(first).args, undefined, B);
  await read;
}
