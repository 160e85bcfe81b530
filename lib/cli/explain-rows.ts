/** Rows as the model sees them: what is trained, what only is read, what was cut. */
import type { EncodeOptions } from '../data/encode.js';
import { explainRow, type RowExplanation } from '../data/explain.js';
import { readRows } from '../data/read-rows.js';
import { describePlace } from '../data/rows.js';
import { locate } from '../io/hub.js';
import { Tokenizer } from '../tokenizer/tokenizer.js';
import type { Output } from './output.js';

type Options = { model: string; datasetFormat?: string } & EncodeOptions;

export async function explainRows(
  data: string,
  { model, datasetFormat, ...encoding }: Options,
  which: { rows: number; skip: number },
  output: Output,
): Promise<void> {
  const tokenizer = await Tokenizer.load(await locate(model, 'model'));
  let number = 0;
  for await (const { row, place } of readRows(data, { format: datasetFormat })) {
    number++;
    if (number <= which.skip) continue;
    if (number > which.skip + which.rows) break;
    const explained = explainRow(row, tokenizer, encoding, place);
    const trained = explained.trained.filter(Boolean).length;
    output.object({ type: 'row', row: place.row, file: place.file, line: place.line, ...explained });
    const cut = explained.truncated > 0 ? `, ${explained.truncated} were cut off` : ', none was cut off';
    output.line(`${describePlace(place)}: ${explained.ids.length} tokens, ${trained} of them trained${cut}`);
    output.line(painted(explained, output.color));
    output.line();
  }
  output.line(output.color ? `${green('trained')} ${dim('only read')}` : '«trained», the rest is only read');
}

const green = (text: string) => `\u001b[32m${text}\u001b[0m`;
const dim = (text: string) => `\u001b[2m${text}\u001b[0m`;

/** Runs of tokens of one kind; without colours what is trained stands between « and ». */
function painted({ tokens, trained }: RowExplanation, color: boolean): string {
  let text = '';
  for (let begin = 0; begin < tokens.length; ) {
    let end = begin + 1;
    while (end < tokens.length && trained[end] === trained[begin]) end++;
    const part = visible(tokens.slice(begin, end).join(''));
    if (color) text += lines(part, trained[begin] ? green : dim);
    else text += trained[begin] ? `«${part}»` : part;
    begin = end;
  }
  return text;
}

/** Each line is painted by itself, so that pagers show it right. */
function lines(text: string, paint: (line: string) => string): string {
  return text
    .split('\n')
    .map((line) => (line === '' ? '' : paint(line)))
    .join('\n');
}

/** Data must not steer the terminal: control characters are spelled out. */
function visible(text: string): string {
  return text.replace(/[^\P{Cc}\n\t]/gu, (c) => `\\x${c.charCodeAt(0).toString(16).padStart(2, '0')}`);
}
