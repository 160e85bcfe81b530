/** Saves over an earlier adapter or model, or merges one, each time a later system call failing (fail_io.cpp). */
import { createHash } from 'node:crypto';
import { cpSync, existsSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { type QLoRAError, QuantizedModel } from '../../lib/index.js';
import { disturbed } from './call-log.js';
import { referencesDir } from './references.js';

export interface SaveOutcome {
  call: number;
  /** The call and its file. */
  name: string;
  error: Pick<QLoRAError, 'name' | 'code' | 'message' | 'hint'> | undefined;
  /** What a reader finds: nothing, where the file that it starts from is not there. */
  state: 'old' | 'new' | 'nothing' | 'mixed';
  /** What lay about after the failure. */
  temporary: string[];
  /** Where there is nothing: whether the next save makes it whole. */
  next: boolean;
  /** Whether the model still computes what it did. */
  same: boolean;
}

const [what, folder, log] = process.argv.slice(2) as ['adapter' | 'weights' | 'model' | 'merge', string, string];
const target = join(folder, 'out');
const models = await Promise.all(
  (['nf4', 'fp4'] as const).map((type) =>
    QuantizedModel.load(join(referencesDir('models'), 'llama-train'), { quantization: { type } }),
  ),
);
const [model, other] = models as [QuantizedModel, QuantizedModel];
const adapter = model.addLora('a', { r: 2, targetModules: ['q_proj'] });
const later = model.addLora('b', { r: what === 'weights' ? 2 : 3, targetModules: ['q_proj'], seed: 1 });
if (what === 'adapter') adapter.training = { template: 'alpaca' };

/** What was saved before, and what is saved over it. */
const [before, save] = {
  adapter: [(path: string) => adapter.save(path), (path: string) => later.save(path)],
  weights: [(path: string) => adapter.save(path), (path: string) => later.save(path)],
  model: [(path: string) => other.save(path), (path: string) => model.save(path)],
  merge: [async () => {}, (path: string) => model.merge(path, { adapter: 'b' })],
}[what] as [(path: string) => Promise<void>, (path: string) => Promise<unknown>];
const marker = what === 'model' || what === 'merge' ? 'config.json' : 'adapter_config.json';

const isTemporary = (name: string) => name.endsWith('tmp');
const namesIn = (path: string) => (existsSync(path) ? readdirSync(path) : []);
const temporary = () => [...namesIn(folder), ...namesIn(target)].filter(isTemporary);
const hashOf = (path: string) => {
  const hash = createHash('sha256');
  for (const name of namesIn(path).filter((name) => !isTemporary(name)))
    hash.update(name).update(readFileSync(join(path, name)));
  return hash.digest('hex');
};
const stateOf = () => {
  const hash = hashOf(target);
  if (hash === hashes.old) return 'old';
  if (hash === hashes.new) return 'new';
  return existsSync(join(target, marker)) ? 'mixed' : 'nothing';
};

const old = join(folder, '..', `old-${what}`);
await before(old);
await save(target);
const hashes = { old: hashOf(old), new: hashOf(target) };
if (hashes.old === hashes.new) throw new Error('nothing changes');
const logits = await model.logits([5, 6, 7], { adapter: 'b' });
const prepare = () => {
  rmSync(target, { recursive: true, force: true });
  if (existsSync(old)) cpSync(old, target, { recursive: true });
};
const outcomes: SaveOutcome[] = [];
for (let call = 0; ; call++) {
  prepare();
  disturbed(log);
  process.env.FAIL_AT = String(call);
  const error = await save(target).then(
    () => undefined,
    ({ name, code, message, hint }: QLoRAError) => ({ name, code, message, hint }),
  );
  delete process.env.FAIL_AT;
  const name = disturbed(log);
  if (!name) break;
  const outcome = { call, name, error, state: stateOf(), temporary: temporary() } as const;
  const now = await model.logits([5, 6, 7], { adapter: 'b' });
  if (outcome.state === 'nothing') await save(target);
  const next = outcome.state !== 'nothing' || stateOf() === 'new';
  outcomes.push({ ...outcome, next, same: now.every((x, i) => x === logits[i]) });
}
await Promise.all(models.map((model) => model.dispose()));
console.log(JSON.stringify(outcomes));
