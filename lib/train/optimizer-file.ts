import { QLoRAError } from '../errors.js';
import { openSafetensors, type SafetensorsFile } from '../io/safetensors.js';
import type { Tensor } from '../tensor.js';

/**
 * Opens what Optimizer.save() wrote, and checks that it is the state of the optimizer `kind` that `state` describes.
 *
 * @throws ERR_QLORA_OPTIMIZER_STATE
 */
export async function openState(
  path: string,
  kind: string,
  state: ReadonlyMap<string, Tensor>,
): Promise<SafetensorsFile> {
  const file = await openSafetensors(path);
  try {
    const saved = file.metadata.get('rule');
    if (saved !== kind) {
      throw refused(path, `it holds the state of ${saved ?? 'no optimizer'}, expected that of ${kind}`, 'optimizer');
    }
    for (const [name, { dtype, shape }] of state) {
      const entry = file.tensors.get(name);
      const expected = `${dtype} [${shape.join(', ')}]`;
      if (!entry) throw refused(path, `'${name}', ${expected}, is missing`, 'parameters');
      const got = `${entry.dtype ?? entry.fileDType} [${entry.shape.join(', ')}]`;
      if (got !== expected) throw refused(path, `'${name}' must be ${expected}, got ${got}`, 'parameters');
    }
    for (const name of file.tensors.keys()) {
      if (!state.has(name)) throw refused(path, `'${name}' belongs to nothing that is trained here`, 'parameters');
    }
    await checkNumbers(file, state);
    return file;
  } catch (error) {
    file.close();
    throw error;
  }
}

/** What decides over whole steps must make sense. */
async function checkNumbers(file: SafetensorsFile, state: ReadonlyMap<string, Tensor>): Promise<void> {
  const words = async (name: string) => (await file.readBytes(name)).slice().buffer;
  const [applied = 0, good = 0] = new Int32Array(await words('counters'));
  if (applied < 0 || good < 0 || good > applied) {
    throw refused(file.path, `'counters' must count steps, got ${applied} and ${good}`, 'file');
  }
  if (!state.has('loss_scale')) return;
  const [scale = 0] = new Float32Array(await words('loss_scale'));
  if (!(scale >= 1 && Number.isFinite(scale) && Number.isInteger(Math.log2(scale)))) {
    throw refused(file.path, `'loss_scale' must be a power of two of at least 1, got ${scale}`, 'file');
  }
}

const hints = {
  optimizer: "Go on with the optimizer that wrote it; 'paged' or not makes no difference.",
  parameters: 'It was saved over another adapter or model, or with other options: momentum, computeDtype, lora.',
  file: 'The file is damaged: take an earlier checkpoint.',
};

function refused(path: string, what: string, why: keyof typeof hints): QLoRAError {
  return new QLoRAError('ERR_QLORA_OPTIMIZER_STATE', `${path}: ${what}`, { hint: hints[why] });
}
