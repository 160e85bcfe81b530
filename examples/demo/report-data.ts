/** From what the demo measured to what its report shows. */
import { availableParallelism, cpus } from 'node:os';
import { type Answer, accuracy } from './measure.js';
import type { Question } from './old-skills.js';
import type { ReportData, Sample, SkillScore } from './report-page.js';
import type { training } from './settings.js';
import type { TrainingLog } from './train.js';

/** Answers to all the questions, in the same order before and after. */
export interface Measurement {
  subtractions: readonly Answer[];
  oldSkills: readonly Answer[];
}

export interface Measured {
  before: Measurement;
  after: Measurement;
  log: TrainingLog;
  seconds: number;
  rows: ReportData['rows'];
  parameters: ReportData['parameters'];
  memory: ReportData['memory'];
  adapterDir: string;
  settings: typeof training;
  computeDtype: string;
  device: string;
}

export function makeReportData(m: Measured): ReportData {
  const { before, after, log } = m;
  const subtraction = scores(before.subtractions, after.subtractions);
  const oldSkills = scores(before.oldSkills, after.oldSkills);
  const start = { step: 0, subtraction: subtraction.before, oldSkills: oldSkills.before };
  const end = { step: log.result.steps, subtraction: subtraction.after, oldSkills: oldSkills.after };
  return {
    subtraction: { ...subtraction, questions: after.subtractions.length },
    oldSkills: { ...oldSkills, questions: after.oldSkills.length, kinds: kindsOf(before.oldSkills, after.oldSkills) },
    accuracy: [start, ...log.checks, end],
    samples: samplesOf(before.subtractions, after.subtractions, 12),
    rows: m.rows,
    seconds: { total: m.seconds, training: log.seconds },
    tokensPerSecond: log.tokensPerSecond,
    parameters: m.parameters,
    memory: m.memory,
    adapterDir: m.adapterDir,
    settings: settingsTable(m, log.result.steps),
    machine: `${availableParallelism()} × ${cpus()[0]?.model.trim() ?? process.arch}, Node.js ${process.versions.node}`,
  };
}

/** The first questions of the list with both answers; where the model is not perfect at least one that it gets wrong. */
export function samplesOf(before: readonly Answer[], after: readonly Answer[], count: number): Sample[] {
  const all = after.map(({ question, answer }, i) => ({
    question: textOf(question),
    expected: question.output,
    before: before[i]?.answer ?? '',
    after: answer,
  }));
  const first = all.slice(0, count);
  const wrong = all.find((sample) => sample.after !== sample.expected);
  if (wrong && !first.includes(wrong)) first[first.length - 1] = wrong;
  return first;
}

function textOf({ instruction, input }: Question): string {
  return input ? `${instruction} ${input}` : instruction;
}

function scores(before: readonly Answer[], after: readonly Answer[]) {
  return { before: accuracy(before), after: accuracy(after) };
}

function kindsOf(before: readonly Answer[], after: readonly Answer[]): SkillScore[] {
  const kinds = [...new Set(after.map(({ question }) => question.kind))];
  return kinds.map((kind) => {
    const ofKind = (answers: readonly Answer[]) => answers.filter(({ question }) => question.kind === kind);
    const [was, is] = [ofKind(before), ofKind(after)];
    const [example] = samplesOf(was, is, 1) as [Sample];
    return { kind, questions: is.length, ...scores(was, is), example };
  });
}

function settingsTable({ settings: s, computeDtype, device, rows }: Measured, steps: number): ReportData['settings'] {
  const row = (name: string, value: string | number | boolean, meaning: string) => ({
    name,
    value: String(value),
    meaning,
  });
  return [
    row(
      'quantization',
      'nf4, double',
      'How the frozen weights are kept: 4 bits each in blocks of 64 with a scale, and the scales in 8 bits.',
    ),
    row('computeDtype', computeDtype, 'What is calculated in.'),
    row('device', device, 'Where it is calculated.'),
    row('lora.r', s.lora.r, 'Rank: how much room the adapter has in each layer.'),
    row('lora.alpha', s.lora.alpha, 'How strongly the adapter acts: its output is scaled by alpha / r.'),
    row('lora.targetModules', s.lora.targetModules, 'Which layers get an adapter.'),
    row(
      'dataset',
      `${rows.total} rows`,
      `${rows.total - rows.rehearsal} subtractions and ${rows.rehearsal} rows of old skills.`,
    ),
    row('batchSize', s.batchSize, 'Rows that are looked at before each change.'),
    row('epochs', s.epochs, `How often each row is looked at; it makes ${steps} steps.`),
    row('learningRate', s.learningRate, 'How large the changes are at most.'),
    row('lrScheduler', s.lrScheduler, 'How they shrink towards the end.'),
    row('warmupRatio', s.warmupRatio, 'Share of the steps in which they grow to that size.'),
    row('maxGradNorm', s.maxGradNorm, 'A change larger than this is cut down to it.'),
    row(
      'gradientCheckpointing',
      s.gradientCheckpointing,
      'Saves memory and costs time; a model this small does not need it.',
    ),
    row('seed', s.seed, 'Of everything random: the same seed gives the same result.'),
  ];
}
