/**
 * What a token puts into the text, in bytes. The tokenizers package gives neither offsets nor a streaming decoder;
 * both follow from these bytes. Three kinds of vocabulary:
 * - byte-level: each character of a token stands for one byte (GPT-2's table: printable bytes stand for themselves,
 *   the other 68 for U+0100 onwards);
 * - pieces: SentencePiece's, where U+2581 is a space and `<0x0A>` one byte;
 * - other: tokens do not add up to the text (WordPiece, CTC).
 */
export type VocabularyKind = 'byte-level' | 'pieces' | 'other';

/** The parts of tokenizer.json's decoder that matter here. */
interface DecoderNode {
  type?: string;
  decoders?: DecoderNode[];
  content?: string;
  start?: number;
  pattern?: { String?: string };
}

export interface VocabularyStyle {
  kind: VocabularyKind;
  /** Whether `<0x0A>` is a byte. */
  byteFallback: boolean;
  /** How many spaces decoding takes off the start of a text. */
  leadingSpaces: number;
}

const SPACE_MARK = '\u2581';
const encoder = new TextEncoder();

export function vocabularyStyle(decoder: unknown): VocabularyStyle {
  const nodes = flatten(decoder as DecoderNode | null | undefined);
  const has = (type: string): boolean => nodes.some((node) => node.type === type);
  const toSpace = nodes.some((node) => node.type === 'Replace' && node.pattern?.String === SPACE_MARK);
  const kind = has('ByteLevel')
    ? 'byte-level'
    : has('Metaspace') || has('ByteFallback') || toSpace
      ? 'pieces'
      : 'other';
  const strip = nodes.find((node) => node.type === 'Strip' && node.content === ' ');
  return { kind, byteFallback: has('ByteFallback'), leadingSpaces: has('Metaspace') ? 1 : (strip?.start ?? 0) };
}

function flatten(node: DecoderNode | null | undefined): DecoderNode[] {
  if (node == null) return [];
  return node.type === 'Sequence' ? (node.decoders ?? []).flatMap(flatten) : [node];
}

/** Bytes of an ordinary (not an added) token. */
export function surfaceOf(token: string, style: VocabularyStyle): Uint8Array {
  if (style.kind === 'byte-level') {
    const bytes: number[] = [];
    for (const character of token) {
      const byte = BYTE_OF_CHARACTER.get(character);
      if (byte === undefined) bytes.push(...encoder.encode(character));
      else bytes.push(byte);
    }
    return Uint8Array.from(bytes);
  }
  const byte = style.byteFallback ? /^<0x([0-9A-Fa-f]{2})>$/.exec(token)?.[1] : undefined;
  return byte === undefined
    ? encoder.encode(token.replaceAll(SPACE_MARK, ' '))
    : Uint8Array.of(Number.parseInt(byte, 16));
}

const BYTE_OF_CHARACTER: ReadonlyMap<string, number> = (() => {
  const map = new Map<string, number>();
  const printable = (b: number): boolean => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  let next = 256;
  for (let byte = 0; byte < 256; byte++) map.set(String.fromCharCode(printable(byte) ? byte : next++), byte);
  return map;
})();

/**
 * Where each token ends in the UTF-8 bytes of the text it was encoded from, or undefined where the tokens do not spell
 * the text (a lossy normalizer, an unknown token). A space that the tokenizer put before a word has no width.
 */
export function tokenEnds(bytes: Uint8Array, surfaces: readonly Uint8Array[]): Uint32Array | undefined {
  const ends = new Uint32Array(surfaces.length);
  let position = 0;
  for (let i = 0; i < surfaces.length; i++) {
    const surface = surfaces[i] as Uint8Array;
    if (matches(bytes, position, surface, 0)) position += surface.length;
    else if (surface[0] === 0x20 && matches(bytes, position, surface, 1)) position += surface.length - 1;
    else return undefined;
    ends[i] = position;
  }
  return position === bytes.length ? ends : undefined;
}

function matches(bytes: Uint8Array, position: number, surface: Uint8Array, from: number): boolean {
  if (position + surface.length - from > bytes.length) return false;
  for (let i = from; i < surface.length; i++) if (bytes[position + i - from] !== surface[i]) return false;
  return true;
}
