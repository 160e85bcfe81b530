import { writeFile } from 'node:fs/promises';
import { loadAssets, renderPage } from '../../lib/report/page.js';
import { readRun } from '../../lib/report/run-log.js';
import { runPage } from '../../lib/report/run-page.js';
import { type ReportData, reportExtras } from './report-page.js';

/** Writes the report of the run that left its log in `runDir`, with what the demo has to add, as one HTML file. */
export async function writeReport(file: string, runDir: string, data: ReportData): Promise<void> {
  await writeFile(file, renderPage(runPage(await readRun(runDir), reportExtras(data)), await loadAssets()));
}
