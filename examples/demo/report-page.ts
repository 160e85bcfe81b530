/** What the demo adds to the report of its run: accuracy before and after, answers side by side, what all of it means. */
import { bytes, thousands } from '../../lib/format.js';
import { duration, percent } from '../../lib/report/format.js';
import { type Html, html } from '../../lib/report/html.js';
import { type Chart, section, type Tile, table } from '../../lib/report/page.js';
import { bars, type Extras } from '../../lib/report/run-page.js';

export interface Score {
  before: number;
  after: number;
}

/** One question with the answers of the model before and after. */
export interface Sample {
  question: string;
  expected: string;
  before: string;
  after: string;
}

export interface SkillScore extends Score {
  kind: string;
  questions: number;
  example: Sample;
}

export interface ReportData {
  subtraction: Score & { questions: number };
  oldSkills: Score & { questions: number; kinds: readonly SkillScore[] };
  /** Shares of right answers, measured on a few questions while training went on, and on all at both ends. */
  accuracy: readonly { step: number; subtraction: number; oldSkills: number }[];
  samples: readonly Sample[];
  rows: { total: number; rehearsal: number };
  seconds: { total: number; training: number };
  tokensPerSecond: number;
  parameters: { total: number; trained: number };
  memory: { process: number; file: number; model: number; adapter: number; training: number };
  /** Where the adapter lies, as a reader would type it. */
  adapterDir: string;
  settings: readonly { name: string; value: string; meaning: string }[];
  machine: string;
}

export function reportExtras(data: ReportData): Extras {
  const { subtraction } = data;
  return {
    title: `qlora-node demo: subtraction ${percent(subtraction.before)} → ${percent(subtraction.after)}`,
    header: hero(data),
    tiles: tiles(data),
    story: story(data),
    charts: [accuracyChart(data)],
    sections: [samples(data), skills(data), memory(data)],
    options: settings(data),
    footer: next(data),
  };
}

function tiles({ subtraction, oldSkills, seconds, tokensPerSecond, memory }: ReportData): Tile[] {
  const tile = (label: string, value: string, note: string) => ({ label, value, note });
  return [
    tile(
      'Subtraction',
      percent(subtraction.after),
      `was ${percent(subtraction.before)}; ${subtraction.questions} questions never trained on`,
    ),
    tile('Old skills', percent(oldSkills.after), `was ${percent(oldSkills.before)}; ${oldSkills.questions} questions`),
    tile('Time', `${Math.round(seconds.total)} s`, `${Math.round(seconds.training)} s of it training`),
    tile('Speed', thousands(tokensPerSecond), 'tokens a second, training'),
    tile('Memory', bytes(memory.process), 'most the whole process took'),
    tile('Adapter', bytes(memory.adapter), 'all that has to be shared'),
  ];
}

function accuracyChart({ accuracy }: ReportData): Chart {
  const x = accuracy.map(({ step }) => step);
  return {
    id: 'chart-accuracy',
    title: 'Right answers',
    text: 'Of all held-out questions at the start and the end, and of a few of them while it was learning.',
    format: 'percent',
    tall: true,
    lines: [
      { label: 'Subtraction', color: 'new', x, y: accuracy.map((a) => a.subtraction), width: 3, points: true },
      { label: 'Old skills', color: 'old', x, y: accuracy.map((a) => a.oldSkills), dash: [7, 4], points: true },
    ],
  };
}

function memory({ memory }: ReportData): Html {
  return html`${section(
    'Memory',
    bars([
      { name: 'Model, 16 bits', size: memory.file, meaning: 'as it lies on disk', kind: 'was' },
      { name: 'Model, 4 bits', size: memory.model, meaning: 'as it is kept while training', kind: 'is' },
      { name: 'Adapter on disk', size: memory.adapter, meaning: 'what was learnt', kind: 'is' },
      {
        name: 'Training',
        size: memory.training,
        meaning: 'adapter, its gradients, the optimizer’s memory and intermediate results: the most at one time',
        kind: 'extra',
      },
    ]),
  )}
<p class="note">The whole process, Node.js included, took at most ${bytes(memory.process)}. This model is tiny, so what training needs outweighs its weights; in a model of a billion weights it is the other way round, and 4 bits decide whether it fits.</p>`;
}

function hero({ subtraction, oldSkills, seconds, parameters, samples }: ReportData): Html {
  return html`<header>
<p class="brand">qlora-node · demo report</p>
<div class="hero">
<div>
<h1><span class="from">${percent(subtraction.before)}</span> <span class="arrow" role="img" aria-label="to">→</span> <span class="to">${percent(subtraction.after)}</span></h1>
<p class="lead">A small language model could add but had never seen a minus. In ${duration(seconds.training)} on this computer it learnt to subtract two-digit numbers.</p>
<p class="sub">Its ${millions(parameters.total)} weights stayed frozen, squeezed to about 4 bits each. All it learnt sits in ${thousands(parameters.trained)} extra numbers beside them: that is QLoRA. Of its old skills’ questions it still answers ${percent(oldSkills.after)} right (before: ${percent(oldSkills.before)}).</p>
</div>
${spotlight(samples)}
</div>
</header>`;
}

/** One question that it could not answer and now can. */
function spotlight(samples: readonly Sample[]): Html {
  const sample = samples.find((s) => s.before !== s.expected && s.after === s.expected);
  if (!sample) return html``;
  const said = (name: string, when: string, text: string, mark: Html) =>
    html`<div class="said ${name}"><dt>${when}</dt><dd>${text || '(nothing)'} ${mark}</dd></div>`;
  return html`<div class="spotlight card">
<p>${sample.question}</p>
<dl>${said('was', 'before', sample.before, wrongMark)}${said('is', 'after', sample.after, rightMark)}</dl>
</div>`;
}

function story({ subtraction, rows, memory }: ReportData): Html {
  return html`<section>
<h2>What happened</h2>
<ol class="story">
<li><h3>Squeeze</h3><p>The model was read from disk (${bytes(memory.file)} in 16 bits) and quantized to NF4: about 4 bits a weight, ${bytes(memory.model)} in memory. It never changes after that.</p></li>
<li><h3>Ask</h3><p>${subtraction.questions} subtractions were set aside before anything else. The model was asked all of them, and questions of every skill it had.</p></li>
<li><h3>Train</h3><p>${thousands(rows.total - rows.rehearsal)} other subtractions, and ${thousands(rows.rehearsal)} rows of old skills among them (${percent(rows.rehearsal / rows.total)}): rehearsal, so that the new does not push out the old.</p></li>
<li><h3>Ask again</h3><p>The adapter was saved, loaded back from disk, and the same questions were asked again. The answers are below.</p></li>
</ol>
</section>`;
}

function samples({ samples }: ReportData): Html {
  const rows = samples.map((s) => [s.question, s.expected, answer(s.before, s.expected), answer(s.after, s.expected)]);
  return section(
    'Before and after',
    table(['Question', '#Right', 'Before', 'After'], rows, 'answers'),
    'Questions that it was never trained on. It always gives its likeliest answer.',
  );
}

function answer(given: string, expected: string): Html {
  return given === expected ? html`${rightMark} ${given}` : html`${wrongMark} ${given || '(nothing)'}`;
}

const rightMark = html`<span class="mark yes" role="img" aria-label="right">✓</span>`;
const wrongMark = html`<span class="mark no" role="img" aria-label="wrong">✗</span>`;

function skills({ oldSkills }: ReportData): Html {
  const bar = (share: number, name: string) =>
    html`<td class="share"><span class="meter ${name}"><i style="width:${(100 * share).toFixed(1)}%"></i></span> <b>${percent(share)}</b></td>`;
  return html`<section>
<h2>What it kept</h2>
<p class="note">Fine-tuning on one thing alone makes a model forget the rest. Here is each old skill before and after.</p>
<div class="scroll card"><table class="skills">
<thead><tr><th scope="col">Skill</th><th scope="col">For example</th><th scope="col" class="num">Asked</th><th scope="col">Before</th><th scope="col">After</th></tr></thead>
<tbody>
${oldSkills.kinds.map(
  (
    k,
  ) => html`<tr><th scope="row">${k.kind}</th><td class="example">${k.example.question} <em>${k.example.expected}</em></td><td class="num">${k.questions}</td>${bar(k.before, 'was')}${bar(k.after, 'is')}</tr>
`,
)}</tbody>
<tfoot><tr><th scope="row">all</th><td></td><td class="num">${oldSkills.questions}</td>${bar(oldSkills.before, 'was')}${bar(oldSkills.after, 'is')}</tr></tfoot>
</table></div>
</section>`;
}

function settings({ settings, machine }: ReportData): Html {
  const code = (text: string) => html`<code>${text}</code>`;
  const rows = settings.map(({ name, value, meaning }) => [code(name), code(value), meaning]);
  return html`${section('Settings', table(['Option', 'Value', 'What it means'], rows, 'settings'))}
<p class="note">Run on ${machine}.</p>`;
}

function next({ adapterDir }: ReportData): Html {
  const code = `import { QuantizedModel } from 'qlora-node';

const model = await QuantizedModel.load('examples/demo/model');
await model.loadLora('subtraction', '${adapterDir}');
console.log(await model.generate({ instruction: 'What is 59 minus 38?' }));`;
  return html`<section>
<h2>Use it</h2>
<p class="note">The adapter lies in <code>${adapterDir}</code>, in the layout of PEFT, so Python can load it too.</p>
<pre class="card" tabindex="0"><code>${code}</code></pre>
</section>`;
}

function millions(n: number): string {
  return `${(n / 1e6).toFixed(1)} million`;
}
