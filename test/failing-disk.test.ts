/** A disk that is full, fails or transfers by halves at any call of a save: an error, and what was there before is whole. */
import { spawn } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { constants } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import t, { type Test } from 'tap';
import type { CheckpointOutcome } from './support/checkpoint-child.js';
import { cannotInject, injecting } from './support/injector.js';
import type { SaveOutcome } from './support/save-model-child.js';

t.setTimeout(600_000); // a busy machine starts processes slowly

/** How a call fails, and the code of the error that comes of it where it wrote; half a transfer is gone on with. */
const failures = [
  { failure: 'full disk', failWith: String(constants.errno.ENOSPC), code: 'ERR_QLORA_DISK_FULL' },
  { failure: 'failing disk', failWith: String(constants.errno.EIO), code: 'ERR_QLORA_WRITE_FAILED' },
  { failure: 'half transfers', failWith: 'short', code: undefined },
];
/** Where it read back what it had written. */
const readingCodes = ['ERR_QLORA_READ_FAILED', 'ERR_QLORA_CHECKPOINT_INVALID', 'ERR_QLORA_IO'];

const injector = cannotInject ? {} : injecting('fail_io', t.testdir({}));

interface Outcome {
  call: number;
  name: string;
  error: SaveOutcome['error'];
}

/** Lets a child save again and again below a folder of its own, a later call failing each time; looks at all outcomes. */
async function failEverywhere<T extends Outcome>(
  t: Test,
  { child, args, atLeast, harmless }: { child: string; args: string[]; atLeast: number; harmless: RegExp },
  look: (t: Test, outcome: T, what: string) => void,
): Promise<void> {
  const folder = t.testdir({});
  const { NODE_OPTIONS: _, ...clean } = process.env; // tap's hooks take longer to load than a save takes
  const script = fileURLToPath(new URL(`./support/${child}.js`, import.meta.url));
  const runs = failures.map(async ({ failure, failWith, code }) => {
    const work = join(folder, failWith);
    const log = join(folder, `${failWith}.calls`);
    mkdirSync(join(work, 'runs'), { recursive: true });
    const saving = spawn(process.execPath, [script, ...args, join(work, 'runs'), log], {
      env: { ...clean, ...injector, FAIL_UNDER: join(work, 'runs'), FAIL_LOG: log, FAIL_WITH: failWith },
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    let stdout = '';
    for await (const chunk of saving.stdout.setEncoding('utf8')) stdout += chunk;
    const outcomes = JSON.parse(stdout) as T[];
    t.ok(outcomes.length >= atLeast, `${failure}: ${outcomes.length} calls`);
    for (const outcome of outcomes) {
      const { call, name, error } = outcome;
      const what = `${failure} at call ${call}, ${name}: ${error?.message}`;
      if (!code || (!error && harmless.test(name))) t.equal(error, undefined, what);
      else {
        t.match(error, { name: 'QLoRAError', hint: String }, what);
        const reads = /^(open|read) /.test(name);
        t.ok(
          error?.code === code || (reads && readingCodes.includes(error?.code as string)),
          `${error?.code}, ${what}`,
        );
      }
      look(t, outcome, what);
    }
    t.comment(`${failure}: ${outcomes.length} times`);
  });
  await Promise.all(runs);
}

for (const [what, atLeast] of Object.entries({ adapter: 35, weights: 28, model: 130, merge: 70 })) {
  t.test(`${what}: every system call of a save fails once`, { skip: cannotInject }, async (t) => {
    // What was read or synced is closed, and companions are compared.
    const harmless =
      /^(close \S+\.tmp|close \S+\/model\.safetensors|(open|read) \S+\/(\w*config\.json|qlora_node\.json|chat_template\.jinja))$/;
    const states = { old: 0, new: 0, nothing: 0, mixed: 0 };
    const rows = { child: 'save-model-child', args: [what], atLeast, harmless };
    await failEverywhere<SaveOutcome>(t, rows, (t, { error, state, temporary, next, same }, what) => {
      states[state]++;
      if (!error) t.equal(state, 'new', what);
      if (state === 'nothing') {
        t.match(error?.message, /cannot (rename|sync|remove)/, `only between renames: ${what}`);
        t.ok(
          temporary.some((name) => name.startsWith('.saving.')),
          `${what}: the rest of the new one is there`,
        );
      }
      t.not(state, 'mixed', what);
      if (state === 'old') t.same(temporary, [], `${what}: no leftover`);
      t.ok(next, `${what}: the next save makes it whole`);
      t.ok(same, `${what}: the model computes what it did`);
    });
    t.comment(JSON.stringify(states));
    t.ok(states.old > states.nothing, 'most fail before anything is replaced');
  });
}

t.test('checkpoint: every system call of a save fails once', { skip: cannotInject }, async (t) => {
  // The report is no reason to end a run; old checkpoints that cannot be looked at may stay.
  const harmless =
    /^(close \S+\.tmp|(open|read) \S+\/checkpoint-\d+\/trainer-state\.json|.*(report\.html|metrics\.jsonl)\S*|(open|fsync|close) \S+\/runs)$/;
  const rows = { child: 'checkpoint-child', args: [], atLeast: 100, harmless };
  await failEverywhere<CheckpointOutcome>(
    t,
    rows,
    (t, { error, faults, newest, before, resumed, temporary, left }, what) => {
      t.same(faults, [], `${what}: every checkpoint is whole`);
      t.ok(newest >= before, `${what}: the earlier checkpoint is there`);
      t.equal(resumed, newest, `${what}: and can be gone on from`);
      if (!/remove/.test(error?.message ?? '')) t.same(temporary, [], `${what}: no leftover`);
      t.same(left, [], `${what}: no leftover after a restart`);
    },
  );
});
