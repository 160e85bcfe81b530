/** Options that were given and change nothing beside the others. */
import { log } from '../logger.js';
import { deviceOf, type ResolvedTrainerOptions, schema, type TrainerOptions } from './options.js';

type Name = keyof TrainerOptions;

/** When an option is idle, and why. */
const idle: readonly { names: readonly Name[]; where: (options: ResolvedTrainerOptions) => boolean; why: string }[] = [
  { names: ['momentum'], where: ({ optimizer }) => optimizer !== 'sgd', why: "it is the optimizer 'sgd' that has it" },
  {
    names: ['ademamix'],
    where: ({ optimizer }) => optimizer !== 'ademamix',
    why: "it is for the optimizer 'ademamix'",
  },
  {
    names: ['adamBeta1', 'adamBeta2', 'adamEpsilon'],
    where: ({ optimizer }) => optimizer === 'sgd',
    why: "the optimizer 'sgd' has none",
  },
  {
    names: ['adamEpsilon'],
    where: ({ optimizer }) => optimizer.startsWith('lion'),
    why: 'the optimizer Lion has none',
  },
  { names: ['loraPlusRatio'], where: ({ lora }) => lora === 'none', why: "lora is 'none'" },
  {
    names: ['maxEvalSamples'],
    where: ({ evalDataset }) => evalDataset === undefined,
    why: 'there is no evalDataset',
  },
  {
    names: ['warmupRatio', 'warmupSteps'],
    where: ({ lrScheduler }) => lrScheduler === 'constant',
    why: "the lrScheduler 'constant' has no warm-up; 'constant_with_warmup' has",
  },
  {
    names: ['schedulerOptions'],
    where: ({ lrScheduler }) => !/^(cosine|polynomial)/.test(lrScheduler),
    why: 'they are for cosine and polynomial schedules',
  },
  {
    names: ['activationOffloading'],
    where: (options) => options.activationOffloading && deviceOf(options) === 'cpu',
    why: 'it moves what a GPU holds to the host, and the model is on the CPU',
  },
  { names: ['offline', 'revision'], where: ({ model }) => typeof model !== 'string', why: 'the model is loaded' },
];

/** Tells the log of each that was given another value than its default. */
export function warnOfIdle(options: ResolvedTrainerOptions): void {
  const defaults = schema.parse({ model: '', dataset: [], outputDir: '.' });
  for (const { names, where, why } of idle) {
    if (!where(options)) continue;
    for (const name of names) {
      if (JSON.stringify(options[name]) === JSON.stringify(defaults[name])) continue;
      log('warn', `option '${name}' changes nothing: ${why}`, { option: name });
    }
  }
}
