/**
 * Every file of a model, an adapter and a checkpoint, damaged at random (from a seed): either it still loads, or the error
 * is a QLoRAError. No other exception, no crash, nothing left in memory. The native reader of safetensors has fuzzers of
 * its own (test/native).
 */
import { cpSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import t, { type Test } from 'tap';
import { randomBits } from '../lib/data/order.js';
import { memory, QLoRAError, QLoRATrainer, QuantizedModel } from '../lib/index.js';
import { writeManifest } from '../lib/io/manifest.js';
import { packageRoot, referencesDir } from './support/references.js';
import { tinyRun } from './support/tiny-run.js';

t.setTimeout(600_000); // a busy machine is slow

/** Numbers below n, one after the other. */
type Draw = (n: number) => number;
const draws = (seed: number): Draw => {
  let i = 0;
  return (n) => Math.floor((randomBits(seed, i++) / 2 ** 32) * n);
};

/** What JSON may hold where something else was expected. */
const values = [null, true, -1, 0, 1e308, 2 ** 53, 1.5, '', '__proto__', '../../x', '\ud800', [], [[]], {}, { a: 1 }];

/** One value somewhere inside replaced, removed, or added to. */
function damageJson(json: unknown, draw: Draw): void {
  const places: [Record<string, unknown>, string][] = [];
  const visit = (value: unknown) => {
    if (typeof value !== 'object' || value === null) return;
    for (const key of Object.keys(value)) {
      places.push([value as Record<string, unknown>, key]);
      visit((value as Record<string, unknown>)[key]);
    }
  };
  visit(json);
  const place = places[draw(places.length)];
  if (!place) return;
  const [owner, key] = place;
  const kind = draw(4);
  if (kind === 0) delete owner[key];
  else if (kind === 1) owner[`${key}x`] = owner[key];
  else owner[key] = values[draw(values.length)];
}

function damage(bytes: Buffer, isJson: boolean, draw: Draw): Buffer {
  if (isJson && draw(4) > 0) {
    const json: unknown = JSON.parse(bytes.toString('utf8'));
    for (let n = 1 + draw(2); n > 0; n--) damageJson(json, draw);
    return Buffer.from(JSON.stringify(json));
  }
  // Headers stand at the start of a file: that is where most damage is done.
  const reach = draw(3) > 0 ? Math.min(bytes.length, 2048) : bytes.length;
  const out = Buffer.from(bytes);
  const kind = draw(4);
  if (kind === 0) return out.subarray(0, draw(reach + 1));
  if (kind === 1) return Buffer.concat([out.subarray(0, draw(reach)), out]);
  for (let n = 1 + draw(8); n > 0; n--) out[draw(reach)] = kind === 2 ? draw(256) : 0x22;
  return out;
}

/** Damages one file of the folder after the other, `rounds` times each, and puts it back. */
async function attack(
  t: Test,
  folder: string,
  names: readonly string[],
  rounds: number,
  load: () => Promise<void>,
): Promise<void> {
  await load();
  const before = memory()[0]?.liveBytes;
  let refused = 0;
  let tried = 0;
  for (const [file, name] of names.entries()) {
    const path = join(folder, name);
    const whole = readFileSync(path);
    for (let round = 0; round < rounds; round++) {
      const bytes = damage(whole, name.endsWith('.json'), draws(1000 * file + round));
      writeFileSync(path, bytes);
      tried++;
      try {
        await load();
      } catch (error) {
        refused++;
        if (!(error instanceof QLoRAError) || error.code === 'ERR_QLORA_INTERNAL') {
          t.fail(`${name}, round ${round}: ${(error as Error).stack}`, { head: bytes.toString('latin1', 0, 300) });
        }
      }
    }
    writeFileSync(path, whole);
  }
  await load();
  t.equal(memory()[0]?.liveBytes, before, 'nothing is left in memory');
  t.ok(refused > tried / 4, `${refused} of ${tried} were refused`);
}

t.test('model folders', async (t) => {
  const folder = join(t.testdir({}), 'model');
  cpSync(join(packageRoot(), 'examples', 'demo', 'model'), folder, { recursive: true });
  const names = ['config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json'];
  await attack(t, folder, [...names, 'special_tokens_map.json'], 12, async () => {
    await using model = await QuantizedModel.load(folder, { quantization: 'none' });
    await model.generate('1+1', { maxNewTokens: 1 });
  });
});

t.test('weights, and 4-bit checkpoints', async (t) => {
  const folder = join(t.testdir({}), 'model');
  cpSync(join(referencesDir('quantization'), 'checkpoints', 'llama-64-nf4-double'), folder, { recursive: true });
  await attack(t, folder, ['model.safetensors', 'config.json'], 60, async () => {
    await using _ = await QuantizedModel.load(folder);
  });
});

t.test('adapters', async (t) => {
  const source = join(referencesDir('models'), 'llama');
  const folder = join(t.testdir({}), 'adapter');
  cpSync(join(source, 'adapter'), folder, { recursive: true });
  await using model = await QuantizedModel.load(source);
  await attack(t, folder, ['adapter_config.json', 'adapter_model.safetensors'], 80, async () => {
    await model.loadLora('a', folder);
    model.removeLora('a');
    await model.core.stream.sync();
  });
});

t.test('checkpoints', async (t) => {
  const outputDir = join(t.testdir({}), 'out');
  const options = tinyRun(outputDir, { maxSteps: 2, saveSteps: 1, saveTotalLimit: 1 });
  {
    await using trainer = await QLoRATrainer.create(options);
    await trainer.train();
  }
  const folder = join(outputDir, 'checkpoint-2');
  const resume = async () => {
    await using trainer = await QLoRATrainer.create(options);
    const run = trainer.train({ resume: folder });
    await run.stop();
  };
  const names = readdirSync(folder);
  t.ok(names.includes('manifest.json') && names.includes('optimizer.safetensors'));
  await attack(t, folder, ['manifest.json'], 20, resume);
  // Damage that the manifest does not show: whoever wrote the file wrote its hash too.
  const manifest = readFileSync(join(folder, 'manifest.json'));
  await attack(
    t,
    folder,
    names.filter((name) => name !== 'manifest.json'),
    12,
    async () => {
      rmSync(join(folder, 'manifest.json'));
      await writeManifest(folder);
      await resume();
    },
  );
  writeFileSync(join(folder, 'manifest.json'), manifest);
});
