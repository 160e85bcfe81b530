/**
 * SentencePiece's compiled normalization (`Precompiled` in tokenizer.json): a table that maps byte sequences to
 * replacement text. The package @huggingface/tokenizers stands in plain NFKC for it, which differs from the table in
 * control characters and joined emoji, so this reads the table itself.
 *
 * Layout, little endian: u32 byte length of the trie; the trie as u32 units of a double array (darts-clone); then the
 * replacements, UTF-8 strings that each end in a zero byte. A unit holds, from the lowest bit: 8 bits label, 1 bit
 * "has a leaf", 1 bit "offset is in units of 256", 22 bits offset; a leaf holds the position of its replacement.
 */
export interface Charsmap {
  readonly units: Uint32Array;
  readonly replacements: Buffer;
}

const segmenter = new Intl.Segmenter('en', { granularity: 'grapheme' });
const encoder = new TextEncoder();

/** Decodes the base64 field `precompiled_charsmap`; undefined where it is not such a table. */
export function readCharsmap(base64: string): Charsmap | undefined {
  const bytes = Buffer.from(base64, 'base64');
  if (bytes.length < 8) return undefined;
  const trieBytes = bytes.readUInt32LE(0);
  if (trieBytes % 4 !== 0 || trieBytes < 4 || trieBytes > bytes.length - 4) return undefined;
  const units = new Uint32Array(trieBytes / 4);
  for (let i = 0; i < units.length; i++) units[i] = bytes.readUInt32LE(4 + 4 * i);
  return { units, replacements: bytes.subarray(4 + trieBytes) };
}

/**
 * Normalizes `text`: a user-perceived character of fewer than 6 bytes is looked up whole, and where it (or a longer
 * one) has no entry, code point by code point. That order is SentencePiece's as the `tokenizers` library follows it.
 */
export function applyCharsmap(map: Charsmap, text: string): string {
  let out = '';
  for (const { segment } of segmenter.segment(text)) {
    const bytes = encoder.encode(segment);
    const whole = bytes.length < 6 ? lookup(map, bytes) : undefined;
    if (whole !== undefined) {
      out += whole;
      continue;
    }
    for (const character of segment) out += lookup(map, encoder.encode(character)) ?? character;
  }
  return out;
}

/** The replacement of the shortest prefix of `key` that the table knows. */
function lookup({ units, replacements }: Charsmap, key: Uint8Array): string | undefined {
  let position = offsetOf(units[0] ?? 0);
  for (const byte of key) {
    if (byte === 0) return undefined;
    position ^= byte;
    const unit = units[position];
    // The sign bit marks a leaf's value; it takes part in the comparison so that a value is never read as a label.
    if (unit === undefined || (unit & 0x800000ff) >>> 0 !== byte) return undefined;
    position ^= offsetOf(unit);
    if ((unit & 0x100) !== 0) {
      const start = (units[position] ?? 0) & 0x7fffffff;
      const end = replacements.indexOf(0, start);
      return replacements.toString('utf8', start, end < 0 ? replacements.length : end);
    }
  }
  return undefined;
}

function offsetOf(unit: number): number {
  return ((unit >>> 10) << ((unit & 0x200) >>> 6)) >>> 0;
}
