/** Where numbers stopped being numbers. */
import { Tape } from '../autograd.js';
import { decoderOf, type ModelCore } from '../models/core.js';
import type { LoraAdapter } from '../models/lora-adapter.js';
import { cast } from '../ops/elementwise.js';
import { gradNorm } from '../ops/grad-norm.js';
import type { Tensor } from '../tensor.js';
import { type EnqueuedStep, enqueueLoss, readScalar } from './micro-step.js';
import type { Stepper } from './stepper.js';

/**
 * The first part of the model whose output is not finite in a step's forward pass, which is made again, or, where all of
 * that is finite, whose gradient is the first that is not: a module path where it has one. undefined where all is well.
 */
export async function firstBadPart(
  stepper: Stepper,
  adapter: LoraAdapter | undefined,
  { sequences, firstMicroStep }: EnqueuedStep,
): Promise<string | undefined> {
  const { core, optimizer } = stepper;
  const names = namesOf(core, adapter);
  const parts = stepper.microBatches(sequences);
  for (const [i, part] of parts.entries()) {
    const seen: { name: string; norm: Tensor }[] = [];
    const inspect = (what: string | Tensor, y: Tensor) => {
      using wide = y.dtype === 'f32' ? y.view(y.shape) : cast(undefined, y, 'f32');
      const name = typeof what === 'string' ? what : (names.get(what) ?? 'a norm');
      seen.push({ name, norm: gradNorm(core.stream, [wide]) });
    };
    const pass = { ...stepper.passOf(firstMicroStep + i), checkpointing: 'none' as const, inspect };
    const loss = await readScalar(enqueueLoss(core, undefined, part, 1, pass));
    const finite = await Promise.all(seen.map(async ({ norm }) => isFiniteNorm(norm)));
    const bad = seen[finite.indexOf(false)];
    if (bad) return bad.name;
    if (!Number.isFinite(loss)) return names.get(decoderOf(core, adapter?.name).head.tensors.data) ?? 'the output head';
  }
  for (const [i, part] of parts.entries()) {
    optimizer.zeroGradients();
    enqueueLoss(core, new Tape(), part, 1, stepper.passOf(firstMicroStep + i)).dispose();
    // Gradients go through the layers backwards.
    for (const parameter of stepper.parameters.toReversed()) {
      const gradient = parameter.gradient as Tensor;
      if (!(await isFiniteNorm(gradNorm(core.stream, [gradient])))) return names.get(parameter);
    }
  }
  return undefined;
}

async function isFiniteNorm(norm: Tensor): Promise<boolean> {
  using n = norm;
  return (await n.read())[1] === 1;
}

/** Module paths by their tensors. */
function namesOf({ weights }: ModelCore, adapter: LoraAdapter | undefined): Map<Tensor, string> {
  const names = new Map<Tensor, string>();
  for (const [name, tensor] of weights.dense) names.set(tensor, name.replace(/\.(weight|bias)$/, ''));
  for (const layer of adapter?.layers ?? []) for (const tensor of layer.parameters) names.set(tensor, layer.path);
  for (const [name, tensor] of adapter?.whole.tensors ?? []) names.set(tensor, name.replace(/\.(weight|bias)$/, ''));
  return names;
}
