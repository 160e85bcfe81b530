/** A model as a Hugging Face folder that transformers, with bitsandbytes, loads. */
import { copyFile, mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { writeFileAtomic } from '../io/atomic-file.js';
import { quantizationConfig, quantizedItems } from '../io/bnb-checkpoint.js';
import { type SafetensorsItem, writeSafetensors } from '../io/safetensors.js';
import type { ModelCore } from './core.js';

/** Files that go with the weights as they are. */
const companions = [
  'generation_config.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'chat_template.jinja',
];

export async function saveModel(core: ModelCore, directory: string): Promise<void> {
  await mkdir(directory, { recursive: true });
  const { linears, dense } = core.weights;
  const quantized = linears.filter((linear) => !linear.weight.isDense);
  const items: SafetensorsItem[] = [...dense].map(([name, tensor]) => ({ name, data: tensor }));
  for (const linear of quantized) items.push(...(await quantizedItems(linear.path, linear.weight, core.computeDtype)));
  await writeSafetensors(join(directory, 'model.safetensors'), items, { format: 'pt' });
  const config: Record<string, unknown> = { ...core.configJson };
  const [first] = quantized;
  if (first) config.quantization_config = quantizationConfig(first.weight, core.computeDtype);
  await writeFileAtomic(join(directory, 'config.json'), `${JSON.stringify(config, undefined, 2)}\n`);
  for (const name of companions) {
    await copyFile(join(core.directory, name), join(directory, name)).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== 'ENOENT') throw error;
    });
  }
}
