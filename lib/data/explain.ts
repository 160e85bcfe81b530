/** What rows become, to be shown to people. */
import { Tokenizer } from '../tokenizer/tokenizer.js';
import { type EncodedRow, type EncodeOptions, encodeAny, encodeRow, IGNORED } from './encode.js';
import { type DatasetSource, readRows } from './read-rows.js';
import type { Row, RowPlace } from './rows.js';

/** What a row becomes. */
export interface RowExplanation {
  /** The text of each token; where it is no whole text (a part of a character), as the vocabulary spells it. */
  tokens: string[];
  ids: number[];
  trained: boolean[];
  truncated: number;
}

/** With where it stands, and what was cut: before the token `at`, these tokens. */
export interface LocatedExplanation extends RowExplanation {
  place: RowPlace;
  cuts: { at: number; tokens: string[] }[];
}

/** The row as `encodeRow` encodes it, in readable form. */
export function explainRow(
  row: Row,
  tokenizer: Tokenizer | undefined,
  options: EncodeOptions = {},
  place?: RowPlace,
): RowExplanation {
  return explained(encodeRow(row, tokenizer, options, place), tokenizer);
}

function explained({ ids, labels, truncated }: EncodedRow, tokenizer: Tokenizer | undefined): RowExplanation {
  return {
    tokens: texts(ids, tokenizer),
    ids: Array.from(ids),
    trained: Array.from(labels, (label) => label !== IGNORED),
    truncated,
  };
}

function texts(ids: ArrayLike<number>, tokenizer: Tokenizer | undefined): string[] {
  return Array.from(ids, (id) => (tokenizer ? readable(tokenizer, id) : String(id)));
}

function readable(tokenizer: Tokenizer, id: number): string {
  const text = Buffer.from(tokenizer.surface(id)).toString('utf8');
  return text === '' || text.includes('\ufffd') ? (tokenizer.tokenOf(id) ?? `<${id}>`) : text;
}

export interface ExplainOptions extends EncodeOptions {
  datasetFormat?: string;
  /** Rows left out at the start. Default: none. */
  skip?: number;
  /** At most so many rows, the first ones behind them. Default: all. */
  limit?: number;
}

/**
 * What the rows of a file or folder become with the tokenizer of a model folder, of which no weight is read. A row with
 * nothing to train is shown too.
 */
export async function* explainFile(
  source: DatasetSource,
  modelDirectory: string,
  options: ExplainOptions = {},
): AsyncGenerator<LocatedExplanation> {
  const { datasetFormat, skip = 0, limit = Number.POSITIVE_INFINITY, ...encoding } = options;
  const tokenizer = await Tokenizer.load(modelDirectory);
  if (limit < 1) return;
  for await (const { row, place } of readRows(source, { format: datasetFormat })) {
    if (place.row <= skip) continue;
    const encoded = encodeAny(row, tokenizer, encoding, place);
    const whole = encoded.truncated > 0 ? encodeAny(row, tokenizer, { ...encoding, ...unlimited }, place) : encoded;
    const cuts = cutsOf(encoded, whole.ids).map(({ at, ids }) => ({ at, tokens: texts(ids, tokenizer) }));
    yield { place, ...explained(encoded, tokenizer), cuts };
    if (place.row >= skip + limit) return;
  }
}

const most = 2 ** 30;
const unlimited = { sourceMaxLength: most, targetMaxLength: most, maxLength: 2 * most };

/** Where tokens of `whole` are missing in what was kept: those of the source, of the target, and of what follows. */
function cutsOf({ ids, cut }: EncodedRow, whole: Int32Array): { at: number; ids: Int32Array }[] {
  const cuts: { at: number; ids: Int32Array }[] = [];
  let at = 0;
  let from = 0;
  for (const missing of [cut.source, cut.target]) {
    if (missing === 0) continue;
    while (at < ids.length && ids[at] === whole[from]) {
      at++;
      from++;
    }
    cuts.push({ at, ids: whole.slice(from, from + missing) });
    from += missing;
  }
  const rest = whole.length - from - (ids.length - at);
  if (rest > 0) cuts.push({ at: ids.length, ids: whole.slice(whole.length - rest) });
  return cuts;
}
