/**
 * Checkpoints: folders outputDir/checkpoint-<step>, each a whole PEFT adapter (or a model folder) with the optimizer's
 * state, where the run stood, and a manifest of it all.
 */
import { readdir } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { z } from 'zod';
import { QLoRAError } from '../errors.js';
import { writeFileAtomic } from '../io/atomic-file.js';
import { removeFolder, writeFolder } from '../io/atomic-folder.js';
import { readJson } from '../io/json.js';
import { faultOf, writeManifest } from '../io/manifest.js';
import type { Optimizer } from './optimizer.js';

const stateName = 'trainer-state.json';
const optimizerName = 'optimizer.safetensors';

const stateSchema = z.object({
  version: z.literal(1),
  /** Runs that were started anew in one outputDir, from 0: a later one's checkpoints are newer, whatever their steps. */
  run: z.int().min(0),
  step: z.int().min(0),
  microStep: z.int().min(0),
  totalSteps: z.int().min(1),
  /** Of the last step. JSON has no NaN: null, as before the first. */
  loss: z.number().nullable(),
  /** Steps in a row, up to here, that changed nothing. */
  skipped: z.int().min(0),
  /** The last evaluated step. */
  evaluated: z.int().min(0).optional(),
  /** The step with the lowest loss, and how many evaluations came after it. */
  best: z.object({ step: z.int().min(0), loss: z.number(), since: z.int().min(0) }).optional(),
  instructionSet: z.string(),
  settings: z.record(z.string(), z.unknown()),
  /** Of the rows that `best` was measured on. */
  evalRows: z.string().optional(),
});
export type TrainerState = z.infer<typeof stateSchema>;

/** What is trained: an adapter, or a model. */
export interface Trained {
  write(folder: string): Promise<void>;
  restore(folder: string): Promise<void>;
}

export interface Checkpoint {
  path: string;
  state: TrainerState;
}

export const checkpointPath = (outputDir: string, step: number) => join(outputDir, `checkpoint-${step}`);

/** @throws ERR_QLORA_DISK_FULL, ERR_QLORA_WRITE_FAILED: an earlier folder of this step is as it was */
export async function writeCheckpoint(
  outputDir: string,
  trained: Trained,
  optimizer: Optimizer,
  state: TrainerState,
): Promise<string> {
  const path = checkpointPath(outputDir, state.step);
  await writeFolder(path, async (folder) => {
    await trained.write(folder);
    await optimizer.save(join(folder, optimizerName));
    await writeFileAtomic(join(folder, stateName), `${JSON.stringify(state, undefined, 2)}\n`);
    await writeManifest(folder);
  });
  return path;
}

/** Fills what is trained and the optimizer's state from a checkpoint that was verified. */
export async function restoreCheckpoint(path: string, trained: Trained, optimizer: Optimizer): Promise<void> {
  await trained.restore(path);
  await optimizer.load(join(path, optimizerName));
}

/** @throws ERR_QLORA_CHECKPOINT_INVALID where something is missing or is not what was written */
export async function openCheckpoint(path: string): Promise<Checkpoint> {
  const fault = await faultOf(path);
  if (fault !== undefined) throw invalid(path, fault);
  return { path, state: await readState(path) };
}

async function readState(path: string): Promise<TrainerState> {
  const parsed = stateSchema.safeParse(await readJson(join(path, stateName)));
  if (parsed.success) return parsed.data;
  const [issue] = parsed.error.issues;
  throw invalid(path, `${stateName}: ${issue?.path.join('.')}: ${issue?.message}`);
}

function invalid(path: string, fault: string): QLoRAError {
  return new QLoRAError('ERR_QLORA_CHECKPOINT_INVALID', `${path} cannot be resumed: ${fault}`, {
    hint: 'Resume from an earlier checkpoint; resume: true finds the newest that is whole.',
    detail: { path },
  });
}

interface Listed {
  path: string;
  /** undefined where it cannot be read. */
  state: TrainerState | undefined;
}

/** Newest first: those that cannot be read, then by run and step. */
async function listCheckpoints(outputDir: string): Promise<Listed[]> {
  const names = (await readdir(outputDir)).filter((name) => /^checkpoint-\d+$/.test(name));
  const listed = await Promise.all(
    names.map(async (name): Promise<Listed> => {
      const path = join(outputDir, name);
      return { path, state: await readState(path).catch(() => undefined) };
    }),
  );
  const run = ({ state }: Listed) => state?.run ?? Number.MAX_SAFE_INTEGER;
  const step = ({ path }: Listed) => Number(basename(path).slice('checkpoint-'.length));
  return listed.sort((a, b) => run(b) - run(a) || step(b) - step(a));
}

/** The newest that is whole; `warn` is told of those before it that are not. undefined where there is none. */
export async function newestCheckpoint(
  outputDir: string,
  warn: (message: string) => void,
): Promise<Checkpoint | undefined> {
  for (const { path } of await listCheckpoints(outputDir)) {
    try {
      return await openCheckpoint(path);
    } catch (error) {
      warn((error as Error).message);
    }
  }
  return undefined;
}

/** The number of a run that starts anew here. */
export async function nextRun(outputDir: string): Promise<number> {
  const runs = (await listCheckpoints(outputDir)).map(({ state }) => state?.run ?? -1);
  return Math.max(-1, ...runs) + 1;
}

/** Removes the oldest of this run until `limit` are left, beside the best. The newest must be whole. */
export async function removeOldCheckpoints(outputDir: string, newest: TrainerState, limit: number): Promise<void> {
  const own = (await listCheckpoints(outputDir)).filter(
    ({ state }) => state?.run === newest.run && state.step !== newest.best?.step,
  );
  const old = own.slice(limit);
  if (old.length === 0) return;
  await openCheckpoint(checkpointPath(outputDir, newest.step));
  for (const { path } of old) await removeFolder(path);
}
