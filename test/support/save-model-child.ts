/** Saves an adapter or a model over an earlier one, each time failing at a later system call (fail_io.cpp). */
import { createHash } from 'node:crypto';
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { type QLoRAError, QuantizedModel } from '../../lib/index.js';

const [what, source, target] = process.argv.slice(2) as [string, string, string];
delete process.env.FAIL_AT;
const model = await QuantizedModel.load(source);
const adapter = model.addLora('a', { r: 2 });
adapter.training = { template: 'alpaca' };
const save = () => (what === 'adapter' ? adapter.save(target) : model.save(target));
const hashes = () =>
  Object.fromEntries(
    readdirSync(target).map((name) => [
      name,
      createHash('sha256')
        .update(readFileSync(join(target, name)))
        .digest('hex'),
    ]),
  );
const ids = [5, 6, 7];
await save();
const before = hashes();
const logits = await model.logits(ids);
const outcomes: unknown[] = [];
for (let call = 0; ; call = 2 * call + 1) {
  process.env.FAIL_AT = String(call);
  const error = await save().then(
    () => undefined,
    (e: QLoRAError) => e,
  );
  delete process.env.FAIL_AT;
  if (!error) break;
  const after = hashes();
  const whole = Object.entries(before).every(([name, hash]) => after[name] === hash);
  const now = await model.logits(ids);
  const { name, code, hint } = error;
  outcomes.push({ name, code, hint, whole, same: now.every((x, i) => x === logits[i]), files: Object.keys(after) });
}
console.log(JSON.stringify(outcomes));
await model.dispose();
