/** What was seen in the rows before the first step. */
import { type Preflight, type RowNumber, splitSentence } from '../data/preflight.js';
import { thousands } from '../format.js';
import { percent } from './format.js';
import { type Html, html } from './html.js';
import { section, table, tiles } from './page.js';
import type { RunLog } from './run-log.js';

export function dataOf({ start }: RunLog): Html {
  const seen = start?.preflight;
  if (!seen) return html``;
  const { rows, tokens, targetTokens, truncatedRows, truncatedShare, truncatedTokens, duplicates, emptyTargets } = seen;
  const { split } = seen;
  const counts = [
    { label: 'Rows', value: thousands(rows), note: split ? splitSentence(split) : 'each once' },
    { label: 'Tokens', value: thousands(tokens), note: `${percent(targetTokens / tokens)} of them trained` },
    { label: 'Cut', value: percent(truncatedShare), note: cut(truncatedRows, truncatedTokens) },
    { label: 'Twice', value: thousands(duplicates.count), note: 'rows that are equal to an earlier one' },
    { label: 'Empty', value: thousands(emptyTargets.count), note: 'rows that teach only to end' },
  ];
  return section(
    'Data',
    html`${tiles(counts)}${sources(seen)}${named(seen)}`,
    'What was seen in the rows before the first step.',
  );
}

function cut(rows: number, tokens: number): string {
  return rows === 0 ? 'no row was too long' : `${thousands(rows)} rows lost ${thousands(tokens)} tokens`;
}

function sources({ sources }: Preflight): Html {
  const rows = sources.map(({ name, used, total, tokens, weight }) => [
    html`<code>${name}</code>`,
    total === undefined || total === used ? thousands(used) : `${thousands(used)} of ${thousands(total)}`,
    thousands(tokens),
    String(weight),
  ]);
  return table(['Source', '#Rows used', '#Tokens', '#Weight'], rows, 'results');
}

/** The rows that are worth a look. */
function named({ longest, duplicates, emptyTargets, sources }: Preflight): Html {
  const place = ({ source, row }: RowNumber) =>
    sources.length > 1 ? `row ${thousands(row)} of ${source}` : `row ${thousands(row)}`;
  const rows = [
    ...emptyTargets.rows.map((at) => [place(at), 'its answer is blank']),
    ...duplicates.rows.map((at) => [place(at), `is equal to ${place(at.sameAs)}`]),
    ...longest.map((at) => [place(at), `is among the longest: ${thousands(at.tokens)} tokens`]),
  ];
  return html`<details><summary>Rows that are worth a look</summary>${table(['Row', 'Why'], rows, 'facts')}</details>`;
}
