/** What a row becomes, and how its two parts are put together. */
import { QLoRAError } from '../errors.js';
import { fitPair, type Limits, type Source, type Target } from './fit.js';
import { capital, describePlace, type RowPlace } from './row-fields.js';

/** Marks a token that the loss does not count. */
export const IGNORED = -100;

export interface EncodeOptions {
  /** Name of a template. Default: 'alpaca' for rows of instruction and output, the model's own for conversations. */
  template?: string;
  /** Most tokens of the source with BOS. Default 1024, or maxLength where that is given. */
  sourceMaxLength?: number;
  /** Most tokens of the target with EOS. Default 256, or maxLength where that is given. */
  targetMaxLength?: number;
  /** Most tokens of a row. Default: the two limits together. */
  maxLength?: number;
  /** Trains the source too. Default false. */
  trainOnSource?: boolean;
  /** Of a conversation only the last assistant's turn is trained. Default false. */
  maskHistory?: boolean;
  /**
   * What becomes of special tokens that are written out in the data: 'parse' (default) makes tokens of them, as
   * transformers does; 'text' keeps them text, for data from people one does not trust.
   */
  specialTokens?: 'parse' | 'text';
}

/** A row as ids. labels[t] is ids[t] where the token is trained, else -100; not shifted. */
export interface EncodedRow {
  ids: Int32Array;
  labels: Int32Array;
  /** Tokens that were cut off, and how many of them from source and target. */
  truncated: number;
  cut: { source: number; target: number };
}

/** Source and target cut to their limits, one behind the other. */
export function join(
  source: Source,
  target: Target,
  limits: Limits,
  trainOnSource: boolean,
  place: RowPlace,
): EncodedRow {
  const fitted = fitPair(source, target, limits);
  if (typeof fitted === 'string') throw tooShort(fitted, limits, place);
  const ids = Int32Array.from([...fitted.source, ...fitted.target]);
  const labels = ids.slice();
  if (!trainOnSource) labels.fill(IGNORED, 0, fitted.source.length);
  const { cut } = fitted;
  return { ids, labels, truncated: cut.source + cut.target, cut };
}

function tooShort(what: string, limits: Limits, place: RowPlace): QLoRAError {
  return new QLoRAError('ERR_QLORA_MAX_LENGTH', `${capital(describePlace(place))} cannot be cut to fit: ${what}`, {
    hint: 'Raise sourceMaxLength, targetMaxLength or maxLength.',
    detail: { ...limits, ...place },
  });
}
