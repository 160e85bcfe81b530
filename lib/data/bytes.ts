/** The bytes of data files, decompressed, and their lines. */
import { createReadStream } from 'node:fs';
import { pipeline } from 'node:stream';
import { createGunzip } from 'node:zlib';
import { QLoRAError } from '../errors.js';
import { damaged, unreadable, wrongFormat } from './data-errors.js';

/** A line or an element of an array longer than this is a file of another kind, or a compressed bomb. */
export const mostRecordBytes = 2 ** 26;

/** The content of a file in pieces; of one that ends in .gz what it holds. */
export async function* readBytes(path: string): AsyncGenerator<Buffer> {
  const file = createReadStream(path, { highWaterMark: 2 ** 18 });
  const zipped = path.toLowerCase().endsWith('.gz');
  // What goes wrong below the unzipping ends its stream with the same error.
  const stream = zipped ? pipeline(file, createGunzip({ chunkSize: 2 ** 18 }), () => {}) : file;
  try {
    yield* stream as AsyncIterable<Buffer>;
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    if (code?.startsWith('Z_')) throw damaged(path, undefined, `its compression is damaged or cut short (${message})`);
    throw unreadable(path, error as NodeJS.ErrnoException);
  } finally {
    file.destroy();
  }
}

/** Lines end at \n only: JSON strings may hold every other line separator, which node:readline splits at. */
export async function* readLines(path: string): AsyncGenerator<Buffer> {
  let parts: Buffer[] = [];
  let length = 0;
  for await (const chunk of readBytes(path)) {
    let start = 0;
    for (let end = chunk.indexOf(10); end >= 0; end = chunk.indexOf(10, start)) {
      yield parts.length === 0 ? chunk.subarray(start, end) : Buffer.concat([...parts, chunk.subarray(start, end)]);
      parts = [];
      length = 0;
      start = end + 1;
    }
    const rest = chunk.subarray(start);
    length += rest.length;
    if (length > mostRecordBytes) throw wrongFormat(`${path} has a line longer than ${mostRecordBytes} bytes`, path);
    if (rest.length > 0) parts.push(rest);
  }
  if (parts.length > 0) yield Buffer.concat(parts);
}

/** Text of UTF-8 bytes. A byte-order mark is left out. */
export function textOf(bytes: Uint8Array, path: string, line: number): string {
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch (error) {
    throw notUtf8(path, line, error);
  }
}

/** The content of a file as text, in pieces. */
export async function* readTextPieces(path: string): AsyncGenerator<string> {
  const decoder = new TextDecoder('utf-8', { fatal: true });
  let line = 1;
  const decode = (bytes?: Uint8Array): string => {
    try {
      return decoder.decode(bytes, { stream: bytes !== undefined });
    } catch (error) {
      throw notUtf8(path, line, error);
    }
  };
  for await (const chunk of readBytes(path)) {
    yield decode(chunk);
    for (let at = chunk.indexOf(10); at >= 0; at = chunk.indexOf(10, at + 1)) line++;
  }
  yield decode();
}

function notUtf8(path: string, line: number, cause: unknown): QLoRAError {
  return new QLoRAError('ERR_QLORA_DATASET_INVALID', `${path} is not valid UTF-8 at line ${line} or right behind it`, {
    hint: 'Save it as UTF-8; spreadsheets call it "CSV UTF-8".',
    detail: { path, line },
    cause,
  });
}
