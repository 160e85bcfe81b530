/** The files of a model folder that go with its weights wherever they go: tokenizer, chat template, sampling. */
import { readdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { writeFileAtomic } from '../io/atomic-file.js';
import { readJsonObject } from '../io/json.js';
import { fileInside } from '../io/model-folder.js';
import { pythonJson } from '../io/python-json.js';
import type { TrainingRecord } from '../io/training-record.js';
import { writeTrainingRecord } from '../io/training-record.js';
import type { ModelCore } from './core.js';

export const chatTemplateName = 'chat_template.jinja';

/** Copied as they are. */
export const companions = [
  'tokenizer.json',
  'tokenizer_config.json',
  'tokenizer.model',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  chatTemplateName,
];

/** Copies those of the names that the model's folder has. @throws ERR_QLORA_DISK_FULL, ERR_QLORA_WRITE_FAILED, ERR_QLORA_UNSAFE_PATH */
export async function copyCompanions(core: ModelCore, directory: string, names = companions): Promise<void> {
  const present = new Set(await readdir(core.directory));
  for (const name of names) {
    if (!present.has(name)) continue;
    await writeFileAtomic(join(directory, name), await readFile(await fileInside(core.directory, name)));
  }
}

export interface Manners {
  training: TrainingRecord | undefined;
  /** Jinja; undefined where the tokenizer's own stays. */
  chatTemplate: string | undefined;
  /** Ids that end a text. */
  endTokens: ReadonlySet<number>;
}

/**
 * How a model that an adapter was merged into is to be asked, and where its answers end: the ids that ended a text while
 * it was trained, in generation_config.json; the template of its instructions; and the chat template that goes with it.
 */
export async function writeManners(
  core: ModelCore,
  directory: string,
  { training, chatTemplate, endTokens }: Manners,
): Promise<void> {
  const names = new Set(await readdir(core.directory));
  const path = 'generation_config.json';
  const own = names.has(path) ? await readJsonObject(await fileInside(core.directory, path)) : {};
  const ends = [...endTokens];
  const generation = { ...own, ...(ends.length ? { eos_token_id: ends.length === 1 ? ends[0] : ends } : {}) };
  if (Object.keys(generation).length) {
    await writeFileAtomic(join(directory, path), `${pythonJson(generation, 2)}\n`);
  }
  if (training) await writeTrainingRecord(directory, training);
  if (chatTemplate !== undefined) {
    await writeFileAtomic(join(directory, chatTemplateName), chatTemplate);
  }
}
