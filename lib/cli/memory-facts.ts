/** What a model takes in memory: loaded, and trained with the defaults. Of its files only headers are read. */

import { QuantizedModel } from '../quantized-model.js';
import { resolveTrainerOptions } from '../train/options.js';
import { planRun } from '../train/planned-run.js';
import type { MemoryPlan } from '../train/rehearsal.js';

export interface MemoryFacts {
  /** Of the row that training is planned for. */
  rowTokens: number;
  /** Nothing but the model, in 4 bits unless its files have a quantization of their own. */
  loading: MemoryPlan;
  training: MemoryPlan;
  withoutCheckpointing: MemoryPlan;
}

/** The longest row that the default limits of prompt and answer let through. */
const [promptTokens, answerTokens] = [1024, 256];

/** @param initialAdapter what would be trained on; left out: a new adapter. @throws what QLoRATrainer.plan() throws */
export async function memoryFacts(model: string, initialAdapter?: string): Promise<MemoryFacts> {
  const rowTokens = promptTokens + answerTokens;
  const inputIds = new Int32Array(rowTokens);
  const labels = new Int32Array(rowTokens).fill(-100, 0, promptTokens);
  const trained = async (gradientCheckpointing: boolean) => {
    // Nothing is written.
    const options = { model, dataset: [{ inputIds, labels }], outputDir: '.', gradientCheckpointing };
    const resolved = resolveTrainerOptions(initialAdapter === undefined ? options : { ...options, initialAdapter });
    const { memory, datasets } = await planRun(resolved, 'any');
    await datasets.close();
    return memory;
  };
  return {
    rowTokens,
    loading: await loadingPlan(model),
    training: await trained(true),
    withoutCheckpointing: await trained(false),
  };
}

async function loadingPlan(model: string): Promise<MemoryPlan> {
  await using loaded = await QuantizedModel.loadWith(model, {}, 'as-in-file', 'rehearsal');
  const { peakBytes, byClass } = loaded.memory();
  const weights = byClass.weights ?? 0;
  return { weights, adapters: 0, optimizer: 0, activations: 0, scratch: peakBytes - weights, total: peakBytes };
}
