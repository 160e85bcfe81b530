/** An explained row as text for a terminal. */
import type { RowExplanation } from './explain.js';
import { describePlace, type RowPlace } from './row-fields.js';

/** How parts are set apart: `ansi` by colour, `plain` by brackets. */
export type ExplainStyle = 'ansi' | 'plain';

const marks: Readonly<Record<ExplainStyle, Record<'trained' | 'cut' | 'note', readonly [string, string]>>> = {
  ansi: { trained: ['\x1b[32m', '\x1b[39m'], cut: ['\x1b[31;9m', '\x1b[39;29m'], note: ['\x1b[2m', '\x1b[22m'] },
  plain: { trained: ['«', '»'], cut: ['{-', '-}'], note: ['', ''] },
};
/** Of a cut that is longer, its start and end are shown. */
const mostCutTokens = 40;

/**
 * The tokens of a row as they read, what is trained green (or in « »), what was cut red and struck through (or in
 * {- -}), with a line of counts in front. Control characters of the data are written out, so that a row cannot steer the
 * terminal.
 */
export function renderExplanation(
  row: RowExplanation & { place?: RowPlace; cuts?: readonly { at: number; tokens: readonly string[] }[] },
  style: ExplainStyle,
): string {
  const paint = marks[style];
  const wrap = (kind: 'trained' | 'cut' | 'note', text: string): string => {
    const [open, close] = paint[kind];
    // Colours are closed at line ends: a pager shows each line by itself.
    return text === '' ? '' : open + (style === 'ansi' ? text.replaceAll('\n', `${close}\n${open}`) : text) + close;
  };
  const { tokens, trained, truncated, cuts = [], place } = row;
  const targets = trained.filter(Boolean).length;
  const counts = [
    `${tokens.length} tokens`,
    targets > 0 ? `${targets} trained` : 'NOTHING is trained',
    ...(truncated > 0 ? [`${truncated} cut`] : []),
  ];
  const head = [...(place ? [describePlace(place)] : []), counts.join(', ')].join(': ');
  let body = '';
  for (let start = 0; start <= tokens.length; ) {
    for (const cut of cuts) if (cut.at === start) body += wrap('cut', shown(shortened(cut.tokens)));
    let end = start + 1;
    while (end < tokens.length && trained[end] === trained[start] && !cuts.some(({ at }) => at === end)) end++;
    const text = shown(tokens.slice(start, end));
    body += trained[start] ? wrap('trained', text) : text;
    start = end;
  }
  return `${wrap('note', shown([head]))}\n${body}\n`;
}

function shortened(tokens: readonly string[]): readonly string[] {
  if (tokens.length <= mostCutTokens) return tokens;
  const part = mostCutTokens / 2;
  return [...tokens.slice(0, part), ` ... ${tokens.length - mostCutTokens} more ... `, ...tokens.slice(-part)];
}

/** Line breaks stay; other control characters, and those that turn the direction of text, are written as escapes. */
function shown(tokens: readonly string[]): string {
  return tokens
    .join('')
    .replace(/\r?\n/g, '\n')
    .replace(/[^\P{C}\n\u200c\u200d]/gu, (c) => `\\u{${(c.codePointAt(0) as number).toString(16)}}`);
}
