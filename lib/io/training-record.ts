/** What an adapter remembers of its training, beside PEFT's files: qlora_node.json. */
import { join } from 'node:path';
import type { QLoRAError } from '../errors.js';
import { writeFileAtomic } from './atomic-file.js';
import { readText } from './json.js';

export interface TrainingRecord {
  /** The template that instructions were trained with. */
  template: string;
  /** The template that conversations were trained with; left out, it was the model's own. */
  chatTemplate?: string;
}

export const trainingRecordName = 'qlora_node.json';

export async function writeTrainingRecord(directory: string, record: TrainingRecord): Promise<void> {
  await writeFileAtomic(join(directory, trainingRecordName), `${JSON.stringify(record, undefined, 2)}\n`);
}

/** undefined for an adapter that was made elsewhere. @throws ERR_QLORA_READ_FAILED, ERR_QLORA_FILE_TOO_LARGE, ERR_QLORA_JSON (no UTF-8) */
export async function readTrainingRecord(directory: string): Promise<TrainingRecord | undefined> {
  let text: string;
  try {
    text = await readText(join(directory, trainingRecordName));
  } catch (error) {
    if ((error as QLoRAError).code === 'ERR_QLORA_FILE_NOT_FOUND') return undefined;
    throw error;
  }
  try {
    const { template, chatTemplate } = JSON.parse(text) as Partial<TrainingRecord>;
    if (typeof template !== 'string') return undefined;
    return { template, ...(typeof chatTemplate === 'string' && { chatTemplate }) };
  } catch {
    return undefined;
  }
}
