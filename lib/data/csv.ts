/** Tables in text: a header row, then a row a record. */
import { pipeline, Readable } from 'node:stream';
import { CsvError, type Info, parse } from 'csv-parse';
import { mostRecordBytes, readTextPieces } from './bytes.js';
import { damaged, wrongFormat } from './data-errors.js';
import type { RawRecord } from './readers.js';

/** Columns beyond this are a file of another kind. */
const mostColumns = 10_000;

export async function* readTable(path: string, delimiter: ',' | '\t'): AsyncGenerator<RawRecord> {
  const parser = parse({
    delimiter,
    info: true,
    skip_empty_lines: true,
    // A quote inside a field that does not begin with one is text, as for most programs that write tables.
    relax_quotes: true,
    max_record_size: mostRecordBytes,
  });
  // An error of either end comes out of the parser.
  pipeline(Readable.from(readTextPieces(path)), parser, () => {});
  let names: string[] | undefined;
  try {
    for await (const { record, info } of parser as AsyncIterable<{ record: string[]; info: Info }>) {
      if (names === undefined) {
        names = checkHeader(record, path, delimiter);
        continue;
      }
      const columns = names;
      // fromEntries defines own properties: no name of a column reaches a prototype.
      yield { file: path, line: info.lines, parse: () => Object.fromEntries(columns.map((c, i) => [c, record[i]])) };
    }
  } catch (error) {
    if (!(error instanceof CsvError)) throw error;
    const line = (error as unknown as { lines?: number }).lines;
    throw damaged(path, line, error.message, error);
  }
}

function checkHeader(record: string[], path: string, delimiter: string): string[] {
  const [only = ''] = record;
  const other = record.length === 1 ? [';', '\t', ','].find((mark) => only.includes(mark)) : undefined;
  if (other !== undefined) {
    const [found, wanted] = [other, delimiter].map((mark) => (mark === '\t' ? 'tabs' : `'${mark}'`));
    throw wrongFormat(
      `The columns of ${path} are separated by ${found}, not by ${wanted}`,
      path,
      `Save it again with ${wanted} between the columns; a file with tabs is named .tsv.`,
    );
  }
  const names = record.map((name) => name.trim());
  const twice = names.find((name, i) => name !== '' && names.indexOf(name) < i);
  if (twice !== undefined) throw damaged(path, 1, `its header has the column '${twice.slice(0, 80)}' twice`);
  if (names.length > mostColumns) throw damaged(path, 1, `its header has ${names.length} columns`);
  return names;
}
