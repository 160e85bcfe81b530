import { readFile, writeFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { type ReportAssets, type ReportData, renderReport } from './report/page.js';

/** Writes the report as one HTML file. `folder` is the demo's folder of sources, which holds style and script. */
export async function writeReport(file: string, data: ReportData, folder: string): Promise<void> {
  await writeFile(file, renderReport(data, await loadAssets(folder)));
}

export async function loadAssets(folder: string): Promise<ReportAssets> {
  const uplot = dirname(createRequire(import.meta.url).resolve('uplot/package.json'));
  const [chartLibrary, chartStyle, style, script] = await Promise.all(
    [
      join(uplot, 'dist', 'uPlot.iife.min.js'),
      join(uplot, 'dist', 'uPlot.min.css'),
      join(folder, 'report', 'style.css'),
      join(folder, 'report', 'charts.js'),
    ].map((path) => readFile(path, 'utf8')),
  );
  // Its licence line names its home; the page holds no address that a browser could take for a resource.
  return { chartLibrary: chartLibrary?.replaceAll('https://', ''), chartStyle, style, script } as ReportAssets;
}
