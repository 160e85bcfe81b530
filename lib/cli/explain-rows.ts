/** Rows as the model sees them, printed: what is trained, what only is read, what was cut. */
import { type ExplainOptions, explainFile } from '../data/explain.js';
import { renderExplanation } from '../data/render-explain.js';
import { locate } from '../io/hub.js';
import type { Output } from './output.js';

export async function explainRows(
  data: string,
  model: string,
  options: ExplainOptions & { offline?: boolean; revision?: string },
  output: Output,
): Promise<void> {
  const { offline, revision, ...how } = options;
  const style = output.color ? 'ansi' : 'plain';
  for await (const row of explainFile(data, await locate(model, 'model', { offline, revision }), how)) {
    const { place, ...explained } = row;
    output.object({ type: 'row', row: place.row, file: place.file, line: place.line, ...explained });
    output.line(renderExplanation(row, style));
  }
  output.line(
    output.color
      ? '\u001b[32mtrained\u001b[39m, only read, \u001b[31;9mcut\u001b[39;29m'
      : '«trained», only read, {-cut-}',
  );
}
