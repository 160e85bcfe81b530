/** The report of a run: how it learnt, what it said meanwhile, what it took, and with which options. */

import { questionIn } from '../data/templates.js';
import { bytes, thousands } from '../format.js';
import { smooth } from './curve.js';
import { dataOf } from './data-section.js';
import { clock, duration, percent } from './format.js';
import { type Html, html } from './html.js';
import { type Chart, figures, type Page, section, type Tile, table, tiles } from './page.js';
import type { RunLog } from './run-log.js';

/** What a program has to add to the report of its run. */
export interface Extras {
  title?: string;
  /** In place of the header. */
  header?: Html;
  tiles?: readonly Tile[];
  /** Between header and curves. */
  story?: Html;
  charts?: readonly Chart[];
  /** Behind the curves. */
  sections?: readonly Html[];
  /** In place of the table of options. */
  options?: Html;
  /** Behind everything. */
  footer?: Html;
}

/** Seconds after which a browser loads the page of a run that goes on again. */
const refresh = 10;

export function runPage(log: RunLog, extras: Extras = {}): Page {
  const charts = [...(extras.charts ?? []), ...chartsOf(log)];
  const page = {
    title: extras.title ?? `${log.name}: ${headline(log)}`,
    charts,
    body: [
      extras.header ?? header(log),
      tiles(extras.tiles ?? tilesOf(log)),
      extras.story ?? html``,
      section('How it learnt', figures(charts)),
      ...(extras.sections ?? []),
      samples(log),
      memory(log),
      dataOf(log),
      messages(log),
      extras.options ?? options(log),
      extras.footer ?? html``,
    ],
  };
  return log.end ? page : { ...page, refresh };
}

export function chartsOf(log: RunLog): Chart[] {
  const { curve, evals, start } = log;
  const steps = curve.column('step');
  const line = (label: string, y: readonly number[]) => ({ label, color: 'new', x: steps, y });
  const loss = curve.column('loss');
  const rate = curve.column('learningRate');
  const evalLoss = { label: 'Eval loss', color: 'old', x: evals.map((e) => e.step), y: evals.map((e) => e.loss) };
  const plan = start?.memoryPlan?.total;
  const planned = {
    label: 'Plan',
    color: 'old',
    dash: [7, 4],
    width: 1.5,
    x: steps,
    y: steps.map(() => plan as number),
  };
  return [
    {
      id: 'chart-loss',
      title: 'Loss',
      text: `How surprised the model is by the right answer; lower is better. Thin: each step. Thick: smoothed.${evals.length ? ' Dashed: on rows that it is not trained on.' : ''}`,
      format: 'loss',
      tall: true,
      lines: [
        { ...line('Each step', loss), color: 'past', width: 1, alpha: 0.55 },
        { ...line('Smoothed', smooth(steps, loss)), width: 3 },
        ...(evals.length ? [{ ...evalLoss, dash: [7, 4], points: true }] : []),
      ],
    },
    {
      id: 'chart-rate',
      title: 'Learning rate',
      text: 'How large a step the optimizer takes.',
      format: 'rate',
      lines: [line('Learning rate', rate)],
    },
    {
      id: 'chart-norm',
      title: 'Gradient norm',
      text: 'How strongly the rows pull. Peaks are rows that surprise it; a steady rise means that it diverges.',
      format: 'loss',
      lines: [{ ...line('Gradient norm', curve.column('gradNorm')), width: 1.5 }],
    },
    {
      id: 'chart-speed',
      title: 'Tokens a second',
      text: 'How fast the rows went through.',
      format: 'count',
      lines: [{ ...line('Tokens a second', curve.column('tokensPerSecond')), width: 1.5 }],
    },
    {
      id: 'chart-memory',
      title: 'Memory',
      text: `In use by the model and its training${plan ? ', against what was planned' : ''}.`,
      format: 'bytes',
      lines: [line('In use', curve.column('memoryBytes')), ...(plan ? [planned] : [])],
    },
  ];
}

function headline(log: RunLog): string {
  const { lastStep, start, end } = log;
  const step = lastStep ? `step ${thousands(lastStep.step)}` : 'no step yet';
  if (!end) return lastStep && start ? `${step} of ${thousands(start.totalSteps)}` : 'starting';
  return { finished: `${step}, finished`, stopped: `stopped at ${step}`, failed: `failed after ${step}` }[end.status];
}

function header(log: RunLog): Html {
  const { start, firstStep, lastStep, end, bestEval } = log;
  const done = lastStep && start ? lastStep.step / start.totalSteps : 0;
  const lost = end?.error ? html`<p class="alert">${end.error}</p>` : '';
  const best = bestEval
    ? html` On rows that it is not trained on, its lowest loss is <b>${number(bestEval.loss)}</b>, at step ${thousands(bestEval.step)}.`
    : '';
  return html`<header>
<p class="brand">qlora-node · report of a training run</p>
<h1 class="run">${log.name}</h1>
<p class="lead">${
    !firstStep || !lastStep
      ? 'It has not made its first step yet.'
      : html`Loss <span class="from">${number(firstStep.loss)}</span> <span class="arrow" role="img" aria-label="to">→</span> <span class="to">${number(lastStep.loss)}</span>`
  }</p>
<p class="sub">${start ? html`${start.model.name} on ${start.model.device}: ${thousands(start.model.trainableParameters)} numbers are trained, ${bytes(start.model.sizeBytes)} of weights.` : ''}${best}</p>
<div class="state"><span class="badge ${end?.status ?? 'running'}">${end?.status ?? 'running'}</span>
<progress max="1" value="${done}" aria-label="share of the steps"></progress>
<span>${headline(log)}${remaining(log)}</span></div>
${lost}
</header>`;
}

/** Time left at the pace so far. */
function remaining({ start, lastStep, end, curve }: RunLog): string {
  const first = curve.column('step')[0];
  if (!start || !lastStep || end || first === undefined) return '';
  const seconds = (Date.parse(lastStep.time) - Date.parse(start.time)) / 1000;
  const left = (seconds / lastStep.step) * (start.totalSteps - lastStep.step);
  return `, about ${duration(left)} left`;
}

function tilesOf(log: RunLog): Tile[] {
  const { curve, evals, bestEval, start, lastStep, end } = log;
  if (!lastStep || !start) return [];
  const speeds = curve.column('tokensPerSecond').filter((v) => v > 0);
  const speed = speeds.length / speeds.reduce((sum, v) => sum + 1 / v, 0);
  const most = end?.peakMemoryBytes ?? Math.max(...curve.column('memoryBytes'));
  const plan = start.memoryPlan?.total;
  const last = evals.at(-1);
  const seconds = (Date.parse((end ?? lastStep).time) - Date.parse(start.time)) / 1000;
  return [
    { label: 'Loss', value: number(lastStep.loss), note: `of step ${thousands(lastStep.step)}` },
    ...(last && bestEval
      ? [
          {
            label: 'Eval loss',
            value: number(last.loss),
            note: `best ${number(bestEval.loss)} at ${thousands(bestEval.step)}`,
          },
        ]
      : []),
    {
      label: 'Epoch',
      value: lastStep.epoch.toFixed(2),
      note: `step ${thousands(lastStep.step)} of ${thousands(start.totalSteps)}`,
    },
    { label: 'Time', value: clock(seconds), note: `since ${start.time.slice(0, 16).replace('T', ' ')} UTC` },
    { label: 'Speed', value: thousands(speed), note: 'tokens a second' },
    { label: 'Memory', value: bytes(most), note: plan ? `${percent(most / plan)} of the plan` : 'the most in use' },
  ];
}

/** Each prompt with what was answered, step by step. */
function samples({ samples }: RunLog): Html {
  if (samples.length === 0) return html``;
  const prompts = [...new Set(samples.map(({ prompt }) => prompt))];
  const cards = prompts.map((prompt) => {
    const answers = samples.filter((s) => s.prompt === prompt);
    const expected = answers[0]?.expected;
    const row = (step: string, text: string, kind = '') =>
      html`<tr class="${kind}"><th scope="row" class="num">${step}</th><td class="text">${text || '(nothing)'}</td></tr>
`;
    return html`<div class="card sample"><p class="text">${questionIn(prompt)}</p>
<div class="scroll"><table><thead><tr><th scope="col" class="num">Step</th><th scope="col">Answer</th></tr></thead><tbody>
${firstAndLast(answers, 6).map(({ step, text }) => row(thousands(step), text))}${expected === undefined ? '' : row('right', expected, 'expected')}</tbody></table></div></div>
`;
  });
  return section(
    'What it said meanwhile',
    html`<div class="samples">${cards}</div>`,
    'After evaluations it was asked some of the rows that it is not trained on, and gave its likeliest answer.',
  );
}

/** The first, and the newest of the others. */
function firstAndLast<T>(list: readonly T[], most: number): T[] {
  return list.length <= most ? [...list] : [list[0] as T, ...list.slice(1 - most)];
}

/** What was planned by class, and the most that was in use. */
function memory({ start, end }: RunLog): Html {
  const plan = start?.memoryPlan;
  if (!plan) return html``;
  const { total = 0, pinned, ...classes } = plan;
  const peak = end?.peakMemoryBytes;
  const rows: Bar[] = Object.entries(classes).map(([name, size]) => ({ name, size, kind: 'was' }));
  rows.push({ name: 'plan in all', size: total, kind: 'was' });
  if (peak !== undefined) rows.push({ name: 'the most in use', size: peak, kind: 'is' });
  if (pinned !== undefined) rows.push({ name: 'pinned', meaning: "of the host's memory", size: pinned, kind: 'was' });
  return section('Memory against plan', bars(rows));
}

export interface Bar {
  name: string;
  meaning?: string;
  /** In bytes. */
  size: number;
  /** How it is coloured. */
  kind: 'is' | 'was' | 'extra';
}

export function bars(rows: readonly Bar[]): Html {
  const largest = Math.max(...rows.map(({ size }) => size));
  return html`<div class="card scroll"><table class="memory"><tbody>
${rows.map(
  ({ name, meaning, size, kind }) =>
    html`<tr><th scope="row">${name}${meaning ? html`<small>${meaning}</small>` : ''}</th><td class="share"><span class="meter long ${kind}"><i style="width:${((100 * size) / largest).toFixed(1)}%"></i></span></td><td class="num"><b>${bytes(size)}</b></td></tr>
`,
)}</tbody></table></div>`;
}

function messages({ warnings, checkpoints }: RunLog): Html {
  const warned = warnings.map(({ step, code, message }) => [thousands(step), html`<code>${code}</code>`, message]);
  const saved = checkpoints.map(({ step, path }) => [thousands(step), html`<code>${path}</code>`]);
  return html`${warned.length ? section('Warnings', table(['#Step', 'Code', 'What'], warned, 'messages')) : ''}
${saved.length ? section('Checkpoints', table(['#Step', 'Folder'], saved, 'messages')) : ''}`;
}

function options({ start }: RunLog): Html {
  if (!start) return html``;
  const { options } = start;
  return section('Options', facts(Object.entries(options)), 'As they were used, with their defaults.');
}

function facts(entries: readonly (readonly [string, unknown])[]): Html {
  return table(
    ['Name', 'Value'],
    entries.map(([name, value]) => [html`<code>${name}</code>`, html`<code>${shown(value)}</code>`]),
    'facts',
  );
}

/** A value as it would be typed; long lists are cut. */
export function shown(value: unknown): string {
  const text =
    typeof value === 'string'
      ? value
      : typeof value === 'number'
        ? String(+value.toPrecision(6))
        : JSON.stringify(value);
  return text.length > 300 ? `${text.slice(0, 300)} …` : text;
}

export function number(value: number | null | undefined): string {
  return value == null || Number.isNaN(value) ? '–' : value.toFixed(3);
}
