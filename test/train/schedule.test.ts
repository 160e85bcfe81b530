import t from 'tap';
import { learningRateAt, type ScheduleName } from '../../lib/train/schedule.js';
import { readJson, referencesDir } from '../support/references.js';

interface Schedule {
  name: ScheduleName;
  options: { num_cycles?: number; power?: number; lr_end?: number };
  baseLearningRate: number;
  warmupSteps: number;
  totalSteps: number;
  learningRate: number[];
}

const { schedules } = readJson<{ schedules: Schedule[] }>(referencesDir('optimizers'), 'schedules.json');

for (const s of schedules) {
  t.test(`${s.name} ${JSON.stringify(s.options)}, ${s.warmupSteps} of warm-up`, async (t) => {
    const options = {
      warmupSteps: s.warmupSteps,
      totalSteps: s.totalSteps,
      numCycles: s.options.num_cycles,
      power: s.options.power,
      lrEnd: s.options.lr_end,
    };
    s.learningRate.forEach((expected, step) => {
      const rate = learningRateAt(s.name, s.baseLearningRate, step, options);
      if (Math.abs(rate - expected) > 1e-12 * Math.abs(expected)) t.equal(rate, expected, `step ${step}`);
    });
    t.equal(s.learningRate.length, 105);
  });
}
