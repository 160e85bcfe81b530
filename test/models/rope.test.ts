import t from 'tap';
import { ConfigReader } from '../../lib/models/config-reader.js';
import { llama } from '../../lib/models/families/llama.js';
import { ropeFrequencies } from '../../lib/models/rope.js';
import { packageRoot, readJson } from '../support/references.js';

interface RopeCase {
  name: string;
  config: Record<string, unknown>;
  sequenceLength: number;
  inverseFrequencies: number[];
  factor: number;
}

const { cases } = readJson<{ cases: RopeCase[] }>(packageRoot(), 'test', 'references', 'rope.json');

for (const c of cases) {
  t.test(`${c.name}, ${c.sequenceLength} tokens`, async (t) => {
    const fields = new ConfigReader(c.config);
    const { rope } = llama.config(fields);
    fields.finish();
    const { inverseFrequencies, factor } = ropeFrequencies(rope, c.sequenceLength);
    t.equal(inverseFrequencies.length, c.inverseFrequencies.length);
    const worst = Math.max(...c.inverseFrequencies.map((f, i) => Math.abs((inverseFrequencies[i] as number) - f) / f));
    t.ok(worst <= 1e-6, `relative error ${worst.toExponential(2)}`);
    t.ok(Math.abs(factor - c.factor) <= 1e-12, `factor ${factor}, expected ${c.factor}`);
  });
}

t.test('a scaling that config.json gets wrong', async (t) => {
  const base = cases[0]?.config as Record<string, unknown>;
  const read = (scaling: unknown) => () => {
    const fields = new ConfigReader({ ...base, rope_scaling: scaling });
    llama.config(fields);
    fields.finish();
  };
  t.throws(read({ rope_type: 'spiral', factor: 2 }), { code: 'ERR_QLORA_CONFIG_INVALID', message: /"spiral"/ });
  t.throws(read({ rope_type: 'linear' }), { code: 'ERR_QLORA_CONFIG_INVALID', message: /'factor' must be a number/ });
  t.throws(read({ rope_type: 'linear', factor: 2, facktor: 3 }), {
    code: 'ERR_QLORA_CONFIG_UNKNOWN_FIELD',
    message: /facktor/,
    hint: /factor/,
  });
  t.throws(read({ rope_type: 'longrope', short_factor: [1], long_factor: [1], factor: 2 }), {
    code: 'ERR_QLORA_CONFIG_INVALID',
    message: /short_factor must have 12 numbers.*got 1/,
  });
});
