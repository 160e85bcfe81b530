/** The frame of every report: one HTML file that needs nothing beside itself. */
import { readFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { embeddedJson, type Html, html, raw } from './html.js';

export interface Line {
  label: string;
  /** A colour of style.css, by its name. */
  color: string;
  x: readonly number[];
  /** NaN where there is nothing to draw. */
  y: readonly number[];
  width?: number;
  alpha?: number;
  dash?: readonly number[];
  /** Draw each point too. */
  points?: boolean;
}

export interface Chart {
  id: string;
  title: string;
  text: string;
  lines: readonly Line[];
  /** How values are written. */
  format: 'loss' | 'rate' | 'percent' | 'count' | 'bytes';
  /** Taller than others; where it is the only one such, over the whole width. */
  tall?: boolean;
}

/** What is put into the page: uPlot's script and style, and our own. */
export interface Assets {
  chartLibrary: string;
  chartStyle: string;
  style: string;
  script: string;
}

export async function loadAssets(): Promise<Assets> {
  const uplot = dirname(createRequire(import.meta.url).resolve('uplot/package.json'));
  // Neither file is compiled: they lie beside the sources, from dist/lib/report three folders up.
  const own = fileURLToPath(new URL('../../../lib/report/assets/', import.meta.url));
  const files = {
    chartLibrary: join(uplot, 'dist', 'uPlot.iife.min.js'),
    chartStyle: join(uplot, 'dist', 'uPlot.min.css'),
    style: join(own, 'style.css'),
    script: join(own, 'charts.js'),
  };
  const texts = Object.entries(files).map(async ([name, path]) => [name, await readFile(path, 'utf8')]);
  const assets: Assets = Object.fromEntries(await Promise.all(texts));
  // Its licence line names its home; the page holds no address that a browser could take for a resource.
  return { ...assets, chartLibrary: assets.chartLibrary.replaceAll('https://', '') };
}

export interface Page {
  title: string;
  /** The parts of the page, from above. */
  body: readonly Html[];
  /** Those that `body` has figures for. */
  charts: readonly Chart[];
  /** Seconds after which a browser loads the page again; left out: never. */
  refresh?: number;
}

export function renderPage({ title, body, charts, refresh }: Page, assets: Assets): string {
  const lines = ({ x, y, ...style }: Line) => ({ ...style, x, y: y.map(short) });
  const data = charts.map(({ id, format, tall, lines: all }) => ({ id, format, tall, lines: all.map(lines) }));
  return html`<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
${refresh ? html`<meta http-equiv="refresh" content="${refresh}">` : ''}
<title>${title}</title>
<style>${raw(assets.chartStyle)}</style>
<style>${raw(assets.style)}</style>
</head>
<body>
<main>
${body}
</main>
<script type="application/json" id="charts">${embeddedJson(data)}</script>
<script>${raw(assets.chartLibrary)}</script>
<script>${raw(assets.script)}</script>
</body>
</html>
`.html;
}

/** Six digits are more than a screen shows; JSON has null for NaN. */
function short(value: number): number {
  return Number(value.toPrecision(6));
}

export function figures(charts: readonly Chart[]): Html {
  const drawn = charts.filter(({ lines }) => lines.some(({ x }) => x.length > 0));
  if (drawn.length === 0) return html``;
  return html`<div class="charts">
${drawn.map(
  ({ id, title, text, tall }) => html`<figure class="card ${tall ? 'tall' : ''}">
<figcaption><h3>${title}</h3><p>${text}</p></figcaption>
<div class="chart" id="${id}" role="img" aria-label="${title}. ${text}"></div>
</figure>
`,
)}</div>
<noscript><p class="note">The charts need JavaScript; everything else on this page does not.</p></noscript>`;
}

export function section(title: string, content: Html, note: Html | string = ''): Html {
  return html`<section>
<h2>${title}</h2>
${note ? html`<p class="note">${note}</p>` : ''}
${content}
</section>`;
}

export interface Tile {
  label: string;
  value: string;
  note: string;
}

export function tiles(list: readonly Tile[]): Html {
  return html`<dl class="tiles">
${list.map(
  ({ label, value, note }) => html`<div class="tile"><dt>${label}</dt><dd><b>${value}</b><span>${note}</span></dd></div>
`,
)}</dl>`;
}

/** A column whose name begins with # has numbers; the first names its row. */
export function table(head: readonly string[], rows: readonly (readonly (Html | string)[])[], kind: string): Html {
  const numeric = (i: number) => (head[i]?.startsWith('#') ? html` class="num"` : '');
  const name = (text: string) => text.replace(/^#/, '');
  return html`<div class="card scroll"><table class="${kind}">
<thead><tr>${head.map((text, i) => html`<th scope="col"${numeric(i)}>${name(text)}</th>`)}</tr></thead>
<tbody>
${rows.map(
  ([
    first = '',
    ...rest
  ]) => html`<tr><th scope="row"${numeric(0)}>${first}</th>${rest.map((cell, i) => html`<td${numeric(i + 1)}>${cell}</td>`)}</tr>
`,
)}</tbody></table></div>`;
}
