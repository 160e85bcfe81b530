/** Several runs in one page: their curves together, what they ended with, and how their options differ. */
import { basename, dirname, resolve } from 'node:path';
import { QLoRAError } from '../errors.js';
import { bytes, thousands } from '../format.js';
import { writeFileAtomic } from '../io/atomic-file.js';
import { type CurveField, smooth } from './curve.js';
import { clock } from './format.js';
import { type Html, html } from './html.js';
import { type Chart, figures, type Line, loadAssets, type Page, renderPage, section, table } from './page.js';
import { type RunLog, readRun } from './run-log.js';
import { number, shown } from './run-page.js';

/**
 * Draws the runs of these folders, each a trainer's outputDir, into the page `out`.
 *
 * @throws ERR_QLORA_RUN_NOT_FOUND, ERR_QLORA_RUN_INVALID, ERR_QLORA_ARGUMENT with fewer than two folders, and what
 *   writing a file throws
 */
export async function compareRuns(folders: readonly string[], out: string): Promise<void> {
  if (folders.length < 2) {
    throw new QLoRAError('ERR_QLORA_ARGUMENT', `compare needs at least two folders of runs, got ${folders.length}`, {
      hint: 'Name the outputDir of each run.',
    });
  }
  const runs = await Promise.all(folders.map(readRun));
  await writeFileAtomic(out, renderPage(comparePage(named(runs, folders)), await loadAssets()));
}

export interface NamedRun {
  name: string;
  run: RunLog;
}

/** By the folder's name; where two have the same, with that of the folder above. */
function named(runs: readonly RunLog[], folders: readonly string[]): NamedRun[] {
  const count = (name: string) => runs.filter((run) => run.name === name).length;
  return runs.map((run, i) => {
    const folder = folders[i] as string;
    const above = basename(dirname(resolve(folder)));
    return { run, name: count(run.name) === 1 ? run.name : `${above}/${run.name}` };
  });
}

/** Colours of style.css, and from the seventh run on the same in dashes. */
const colors = ['c1', 'c2', 'c3', 'c4', 'c5', 'c6'];
const dashes = [undefined, [8, 4], [2, 4], [10, 3, 2, 3]];

function look(i: number): Pick<Line, 'color' | 'dash'> {
  const dash = dashes[Math.floor(i / colors.length) % dashes.length];
  return { color: colors[i % colors.length] as string, ...(dash ? { dash } : {}) };
}

function comparePage(runs: readonly NamedRun[]): Page {
  const charts = chartsOf(runs);
  return {
    title: `${runs.length} runs: ${runs.map(({ name }) => name).join(', ')}`,
    charts,
    body: [
      html`<header>
<p class="brand">qlora-node · comparison of training runs</p>
<h1 class="run">${runs.length} runs</h1>
</header>`,
      section('How they ended', results(runs)),
      section('How they learnt', figures(charts)),
      differences(runs),
    ],
  };
}

function chartsOf(runs: readonly NamedRun[]): Chart[] {
  const lines = (
    field: CurveField,
    drawn: (steps: readonly number[], values: readonly number[]) => readonly number[],
  ) =>
    runs.map(({ name, run: { curve } }, i): Line => {
      const x = curve.column('step');
      return { label: name, ...look(i), x, y: drawn(x, curve.column(field)) };
    });
  const chart = (id: string, title: string, text: string, format: Chart['format'], all: Line[]): Chart => ({
    id: `chart-${id}`,
    title,
    text,
    format,
    lines: all,
  });
  const raw = (_: readonly number[], values: readonly number[]) => values;
  const evals = runs.map(({ name, run: { evals } }, i) => ({
    label: name,
    ...look(i),
    points: true,
    x: evals.map((e) => e.step),
    y: evals.map((e) => e.loss),
  }));
  return [
    { ...chart('loss', 'Loss', 'Smoothed; lower is better.', 'loss', lines('loss', smooth)), tall: true },
    {
      ...chart('eval', 'Eval loss', 'On rows that none of them is trained on, if it was the same ones.', 'loss', evals),
      tall: true,
    },
    chart('rate', 'Learning rate', 'How large a step the optimizer takes.', 'rate', lines('learningRate', raw)),
    chart('norm', 'Gradient norm', 'Smoothed: how strongly the rows pull.', 'loss', lines('gradNorm', smooth)),
    chart('speed', 'Tokens a second', 'Smoothed.', 'count', lines('tokensPerSecond', smooth)),
    chart('memory', 'Memory', 'In use by the model and its training.', 'bytes', lines('memoryBytes', raw)),
  ];
}

function results(runs: readonly NamedRun[]): Html {
  const rows = runs.map(({ name, run }, i) => {
    const { lastStep, bestEval, evals, start, end } = run;
    const steps = end?.step ?? lastStep?.step;
    const loss = end?.finalLoss === undefined ? lastStep?.loss : end.finalLoss;
    const seconds =
      lastStep && start ? (Date.parse((end ?? lastStep).time) - Date.parse(start.time)) / 1000 : Number.NaN;
    return [
      html`<i class="swatch" style="background:var(--${look(i).color})"></i> ${name}`,
      end?.status ?? 'running or killed',
      steps === undefined ? '–' : thousands(steps),
      number(loss),
      number(evals.at(-1)?.loss),
      bestEval ? `${number(bestEval.loss)} at ${thousands(bestEval.step)}` : '–',
      Number.isNaN(seconds) ? '–' : clock(seconds),
      end?.peakMemoryBytes === undefined ? '–' : bytes(end.peakMemoryBytes),
      start ? thousands(start.model.trainableParameters) : '–',
    ];
  });
  const head = ['Run', 'Status', '#Steps', '#Loss', '#Eval loss', '#Best', '#Time', '#Memory', '#Trained'];
  return table(head, rows, 'results');
}

/** A row for each option, and for the model, that is not the same in all of them. */
function differences(runs: readonly NamedRun[]): Html {
  const facts = runs.map(({ run: { start } }) => ({ model: start?.model.name, ...start?.options }));
  const names = [...new Set(facts.flatMap((of) => Object.keys(of)))].filter((name) => name !== 'outputDir');
  const valueIn = (of: Record<string, unknown>, name: string) => (of[name] === undefined ? '–' : shown(of[name]));
  const rows = names
    .map((name) => [name, ...facts.map((of) => valueIn(of, name))] as [string, ...string[]])
    .filter(([, ...values]) => new Set(values).size > 1)
    .map(([name, ...values]) => [name, ...values].map((cell) => html`<code>${cell}</code>`));
  if (rows.length === 0) return section('Options', html`<p class="note">All of them are the same.</p>`);
  return section('Options that differ', table(['Option', ...runs.map(({ name }) => name)], rows, 'facts'));
}
