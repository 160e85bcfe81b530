/** The elements of one large array in a JSON file, found without holding the file: each is then parsed by itself. */
import { mostRecordBytes, readBytes } from './bytes.js';
import { damaged, wrongFormat } from './data-errors.js';

/** The text of an element and the line that it begins on. */
export interface JsonElement {
  bytes: Buffer;
  line: number;
}

const [quote, comma, colon, backslash, openList, closeList, openObject, closeObject] = Buffer.from('",:\\[]{}');
const mostDepth = 1000;

/**
 * Where brackets and strings open and close. What stands between is not looked at here: an element that is no JSON
 * fails where it is parsed.
 */
class ElementFinder {
  readonly #path: string;
  #depth = 0;
  #inString = false;
  #escaped = false;
  #line = 1;
  /** Depth of the array's elements; 0 until the array is found. */
  #elementDepth = 0;
  #found = false;
  #count = 0;
  #parts: Buffer[] = [];
  #length = 0;
  #startLine = 1;
  /** Of the outermost object: the bytes of the last string, and whether it stood before a colon. */
  #string: number[] = [];
  #key = '';
  /** The outermost value has ended. */
  ended = false;
  /** A second value follows the outermost: one object a line. */
  isLines = false;

  constructor(path: string) {
    this.#path = path;
  }

  get foundArray(): boolean {
    return this.#found;
  }

  get line(): number {
    return this.#line;
  }

  *push(chunk: Buffer): Generator<JsonElement> {
    let start = 0;
    for (let i = 0; i < chunk.length; i++) {
      const byte = chunk[i] as number;
      if (byte === 10) this.#line++;
      if (this.#inString) {
        if (this.#escaped) this.#escaped = false;
        else if (byte === backslash) this.#escaped = true;
        else if (byte === quote) this.#inString = false;
        if (this.#inString && this.#depth === 1 && this.#elementDepth === 0 && this.#string.length < 8) {
          this.#string.push(byte);
        }
        continue;
      }
      if (byte <= 32) continue;
      if (this.ended) {
        this.isLines = true;
        return;
      }
      if (this.#depth === 0 && byte !== openList && byte !== openObject && !isMark(byte)) {
        throw wrongFormat(mustHold(this.#path), this.#path);
      }
      const inElements = this.#elementDepth > 0 && this.#depth === this.#elementDepth;
      if (byte === quote) {
        this.#inString = true;
        if (this.#elementDepth === 0) this.#string = [];
      } else if (byte === colon && this.#depth === 1 && this.#elementDepth === 0) {
        this.#key = Buffer.from(this.#string).toString('latin1');
      } else if (byte === openList || byte === openObject) {
        if (++this.#depth > mostDepth) throw damaged(this.#path, this.#line, `it nests deeper than ${mostDepth}`);
        const outer = byte === openList && this.#depth === 1;
        const data = byte === openList && this.#depth === 2 && this.#key === 'data' && !this.#found;
        if (this.#elementDepth === 0 && (outer || data)) {
          this.#elementDepth = this.#depth;
          this.#found = true;
          start = i + 1;
          this.#startLine = this.#line;
        }
      } else if (byte === closeList || byte === closeObject) {
        if (inElements) {
          const last = this.#take(chunk.subarray(start, i));
          if (last.bytes.length > 0 || this.#count > 0) yield last;
          this.#elementDepth = 0;
        }
        if (--this.#depth < 0) throw damaged(this.#path, this.#line, 'a bracket closes that was not opened');
        this.ended = this.#depth === 0;
      } else if (byte === comma && inElements) {
        this.#count++;
        yield this.#take(chunk.subarray(start, i));
        start = i + 1;
        this.#startLine = this.#line;
      } else if (byte === comma && this.#depth === 1) this.#key = '';
    }
    if (this.#elementDepth > 0) this.#keep(Buffer.from(chunk.subarray(start)));
  }

  #keep(bytes: Buffer): void {
    this.#length += bytes.length;
    if (this.#length > mostRecordBytes) {
      throw wrongFormat(`${this.#path} has a row longer than ${mostRecordBytes} bytes`, this.#path);
    }
    this.#parts.push(bytes);
  }

  #take(rest: Buffer): JsonElement {
    this.#keep(rest);
    const all = Buffer.concat(this.#parts);
    this.#parts = [];
    this.#length = 0;
    let begin = 0;
    let line = this.#startLine;
    for (; begin < all.length && (all[begin] as number) <= 32; begin++) if (all[begin] === 10) line++;
    return { bytes: all.subarray(begin), line };
  }
}

/** A byte of a byte-order mark. */
function isMark(byte: number): boolean {
  return byte === 0xef || byte === 0xbb || byte === 0xbf;
}

function mustHold(path: string): string {
  return `${path} must hold an array of rows, or an object whose 'data' is one`;
}

/**
 * The rows of a file that holds an array, or an object with the array in `data`. Returns 'lines' without a row where
 * it holds one object after the other instead, as many files named .json do.
 */
export async function* readJsonElements(path: string): AsyncGenerator<JsonElement, 'lines' | undefined> {
  const finder = new ElementFinder(path);
  for await (const chunk of readBytes(path)) {
    for (const element of finder.push(chunk)) yield element;
    if (!finder.isLines) continue;
    if (finder.foundArray) throw damaged(path, finder.line, 'something follows the end of the array');
    return 'lines';
  }
  if (!finder.ended) throw damaged(path, finder.line, 'it ends before its array does: it is cut short');
  if (!finder.foundArray) throw wrongFormat(mustHold(path), path);
  return undefined;
}
