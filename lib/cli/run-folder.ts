/** What a run's folder says of itself: run.json, from which `resume` goes on. */
import { access, readdir } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { QLoRAError } from '../errors.js';
import { writeFileAtomic } from '../io/atomic-file.js';
import { makeFolder } from '../io/folder.js';
import { isObject, readJsonObject } from '../io/json.js';
import type { DatasetSpec } from './config/datasets.js';
import type { PlainOptions } from './config/resolve.js';

export interface RunRecord {
  options: PlainOptions;
  exportDir?: string;
}

const fileName = 'run.json';
const format = 1;

/** Paths become absolute, so that `resume` may be called from anywhere. */
export async function writeRunRecord(outputDir: string, { options, exportDir }: RunRecord): Promise<void> {
  await makeFolder(outputDir);
  const record = {
    format,
    options: {
      ...options,
      model: await absolute(options.model as string),
      outputDir: resolve(outputDir),
      dataset: await absoluteDataset(options.dataset as string | DatasetSpec[]),
      ...(await absoluteWhereText({ evalDataset: options.evalDataset, initialAdapter: options.initialAdapter })),
    },
    ...(exportDir === undefined ? {} : { exportDir: resolve(exportDir) }),
  };
  await writeFileAtomic(join(outputDir, fileName), `${JSON.stringify(record, undefined, 2)}\n`);
}

/** @throws ERR_QLORA_RUN_NOT_FOUND, ERR_QLORA_JSON */
export async function readRunRecord(outputDir: string): Promise<RunRecord> {
  const path = join(outputDir, fileName);
  if (!(await exists(path))) {
    throw new QLoRAError('ERR_QLORA_RUN_NOT_FOUND', `${outputDir} is no folder of a run: it has no ${fileName}`, {
      hint: 'Pass the outputDir of `qlora-node train`.',
    });
  }
  const record = await readJsonObject(path);
  if (record.format !== format || !isObject(record.options)) {
    throw new QLoRAError(
      'ERR_QLORA_RUN_NOT_FOUND',
      `${path} is not of this version: format ${JSON.stringify(record.format)}`,
      {
        hint: 'Start the run again with `qlora-node train --resume` and its configuration.',
      },
    );
  }
  const exportDir = typeof record.exportDir === 'string' ? record.exportDir : undefined;
  return { options: { ...record.options, outputDir } as PlainOptions, exportDir };
}

const ofRun = /^(checkpoint-\d+|adapter_config\.json|adapter_model\.safetensors|model\.safetensors)$/;

/**
 * A run does not begin where another lies unless asked to: what that one made would be replaced.
 *
 * @throws ERR_QLORA_OUTPUT_EXISTS
 */
export async function requireUnused(outputDir: string): Promise<void> {
  const left = (await readdir(outputDir).catch(() => [])).filter((name) => ofRun.test(name));
  if (left.length === 0) return;
  throw new QLoRAError('ERR_QLORA_OUTPUT_EXISTS', `${outputDir} holds an earlier run: ${left.slice(0, 5).join(', ')}`, {
    hint: '--resume goes on with it, --overwrite begins anew; or choose another outputDir.',
  });
}

async function exists(path: string): Promise<boolean> {
  return access(path).then(
    () => true,
    () => false,
  );
}

/** A name on the hub stays as it is. */
async function absolute(path: string): Promise<string> {
  return (await exists(path)) ? resolve(path) : path;
}

async function absoluteDataset(dataset: string | DatasetSpec[]): Promise<string | DatasetSpec[]> {
  if (typeof dataset === 'string') return absolute(dataset);
  return Promise.all(dataset.map(async (spec) => ({ ...spec, source: await absolute(spec.source) })));
}

async function absoluteWhereText(fields: Record<string, unknown>): Promise<Record<string, unknown>> {
  const entries = Object.entries(fields).filter(([, value]) => typeof value === 'string');
  return Object.fromEntries(
    await Promise.all(entries.map(async ([key, path]) => [key, await absolute(path as string)])),
  );
}
