/**
 * Teaches a small model to subtract: quantizes it to 4 bits, asks it, trains an adapter with QLoRA, asks again, and
 * writes result.json and report.html.
 *
 *   npm run demo [-- --device cpu --out demo-output]
 */
import { mkdir, rm, stat, writeFile } from 'node:fs/promises';
import { join, relative, resolve } from 'node:path';
import { parseArgs } from 'node:util';
import { bytes, thousands } from '../../lib/format.js';
import { type Device, QLoRATrainer, QuantizedModel } from '../../lib/index.js';
import { duration, percent } from '../../lib/report/format.js';
import { type DemoData, makeData } from './data.js';
import { sourceFolder } from './folder.js';
import { accuracy, ask } from './measure.js';
import { progress } from './progress.js';
import { writeReport } from './report.js';
import { type Measurement, makeReportData } from './report-data.js';
import type { Sample } from './report-page.js';
import * as settings from './settings.js';
import { train } from './train.js';

async function main(): Promise<number> {
  const { values } = parseArgs({
    options: { device: { type: 'string', default: 'auto' }, out: { type: 'string', default: 'demo-output' } },
  });
  const out = resolve(values.out);
  const modelDir = join(sourceFolder(), 'model');
  const adapterDir = join(out, 'adapter');
  const signal = interruptSignal();
  const start = performance.now();

  console.log('\nqlora-node demo: a model that has never seen a minus learns to subtract\n');
  const data = makeData(settings.data);
  const rehearsal = data.training.filter(({ kind }) => kind !== 'subtract').length;
  const { computeDtype } = settings;
  await using model = await QuantizedModel.load(modelDir, {
    device: values.device as Device | 'auto',
    computeDtype,
    signal,
  });
  const fileBytes = (await stat(join(modelDir, 'model.safetensors'))).size;
  console.log(`  quantized     ${bytes(fileBytes)} in 16 bits to ${bytes(model.sizeBytes)} in NF4, on ${model.device}`);

  const before = await measure('asking before', model, data, null, signal);

  const subtractions = data.training.length - rehearsal;
  console.log(
    `\n  It now trains on ${thousands(subtractions)} other subtractions. ${thousands(rehearsal)} rows of its old skills are mixed in`,
  );
  console.log(`  (${percent(rehearsal / data.training.length)}): without this rehearsal it would forget them.`);
  await rm(adapterDir, { recursive: true, force: true });
  await using trainer = await QLoRATrainer.create({
    model,
    dataset: data.training.map(({ instruction, input, output }) => ({ instruction, input, output })),
    outputDir: adapterDir,
    ...settings.training,
  });
  const totalSteps = Math.ceil((settings.training.epochs * data.training.length) / settings.training.batchSize);
  const log = await train(trainer, data, { totalSteps, check: settings.check, signal });
  if (log.result.stopped) {
    console.log(
      `\nStopped after step ${log.result.steps} of ${totalSteps}; what it had learnt lies in ${log.result.outputDir}`,
    );
    return interrupted;
  }
  const trainingBytes = model.memory().peakBytes - model.sizeBytes;

  // What counts is what lies on disk.
  await model.loadLora('subtraction', adapterDir);
  const after = await measure('asking after ', model, data, 'subtraction', signal);

  const adapterBytes = (await stat(join(adapterDir, 'adapter_model.safetensors'))).size;
  const seconds = (performance.now() - start) / 1000;
  const peakRssBytes = process.resourceUsage().maxRSS * 1024;
  const reportData = makeReportData({
    before,
    after,
    log,
    seconds,
    rows: { total: data.training.length, rehearsal },
    parameters: { total: fileBytes / 2, trained: trainer.adapter?.trainableParameters ?? 0 },
    memory: {
      process: peakRssBytes,
      file: fileBytes,
      model: model.sizeBytes,
      adapter: adapterBytes,
      training: trainingBytes,
    },
    adapterDir: relative('', adapterDir),
    settings: settings.training,
    computeDtype,
    device: model.device,
  });
  const result = {
    before: reportData.subtraction.before,
    after: reportData.subtraction.after,
    keptBefore: reportData.oldSkills.before,
    kept: reportData.oldSkills.after,
    seconds,
    tokensPerSecond: log.tokensPerSecond,
    peakRssBytes,
    adapterDir,
  };
  await mkdir(out, { recursive: true });
  await writeFile(join(out, 'result.json'), `${JSON.stringify(result, null, 2)}\n`);
  await writeReport(join(out, 'report.html'), adapterDir, reportData);

  printSamples(reportData.samples);
  const lines = [
    [
      'subtraction',
      `${percent(result.before)} -> ${percent(result.after)} right, of ${after.subtractions.length} that it was never trained on`,
    ],
    ['old skills', `${percent(result.keptBefore)} -> ${percent(result.kept)} right, of ${after.oldSkills.length}`],
    [
      'time',
      `${duration(seconds)}, ${duration(log.seconds)} of it training at ${thousands(log.tokensPerSecond)} tokens/s`,
    ],
    ['memory', `${bytes(peakRssBytes)} at most, Node.js included`],
    ['adapter', `${relative('', adapterDir)} (${bytes(adapterBytes)})`],
    ['report', `${relative('', join(out, 'report.html'))}, for your browser`],
  ];
  for (const [name, text] of lines) console.log(`  ${name?.padEnd(12)}  ${text}`);
  console.log();
  return verdict(result);
}

async function measure(
  label: string,
  model: QuantizedModel,
  data: DemoData,
  adapter: string | null,
  signal: AbortSignal,
): Promise<Measurement> {
  const { subtractions, oldSkills } = data;
  const total = subtractions.length + oldSkills.length;
  const bar = progress(label, total);
  try {
    const answers = await ask(model, [...subtractions, ...oldSkills], {
      adapter,
      signal,
      onAnswer: (done) => bar.update(done, `${done} of ${total} questions`),
    });
    const measured = {
      subtractions: answers.slice(0, subtractions.length),
      oldSkills: answers.slice(subtractions.length),
    };
    const [now, kept] = [accuracy(measured.subtractions), accuracy(measured.oldSkills)];
    bar.update(total, `right: subtraction ${percent(now)}, old skills ${percent(kept)}`);
    return measured;
  } finally {
    bar.stop();
  }
}

function printSamples(samples: readonly Sample[]): void {
  const mark = (given: string, { expected }: Sample) =>
    `${given === expected ? '✓' : '✗'} ${given}`.padEnd(10).slice(0, 24);
  console.log(`\n  ${'question'.padEnd(24)}${'right'.padEnd(8)}${'before'.padEnd(12)}after`);
  for (const s of samples) {
    console.log(`  ${s.question.padEnd(24)}${s.expected.padEnd(8)}${mark(s.before, s).padEnd(12)}${mark(s.after, s)}`);
  }
  console.log();
}

function verdict({ after, kept, keptBefore }: { after: number; kept: number; keptBefore: number }): number {
  const { goals } = settings;
  const learnt = after >= goals.after;
  const remembers = kept >= goals.kept * keptBefore;
  if (!learnt)
    console.error(`It should answer ${percent(goals.after)} of the subtractions right, not ${percent(after)}.`);
  if (!remembers)
    console.error(`It should keep ${percent(goals.kept)} of what it could do, not ${percent(kept / keptBefore)}.`);
  return learnt && remembers ? 0 : 1;
}

/** What a shell takes for 'ended by Ctrl-C'. */
const interrupted = 130;

/** Ctrl-C once stops after the step in progress; twice ends the process at once. */
function interruptSignal(): AbortSignal {
  const controller = new AbortController();
  process.once('SIGINT', () => controller.abort());
  return controller.signal;
}

try {
  process.exitCode = await main();
} catch (error) {
  if ((error as Error).name !== 'AbortError') throw error;
  console.log('\nStopped.');
  process.exitCode = interrupted;
}
