import { applyCharsmap, readCharsmap } from './charsmap.js';

/** What is used of @huggingface/tokenizers, whose own types do not resolve under NodeNext. */
export interface HfNode {
  config?: { type?: string; precompiled_charsmap?: unknown };
  normalizers?: (HfNode | null)[];
  tokenizers?: HfNode[];
  decoders?: HfNode[];
  normalize?(text: string): string;
  pre_tokenize_text?(text: string): string[];
  decode_chain?(tokens: string[]): string[];
}

export interface HfTokenizer {
  normalizer: (HfNode & ((text: string) => string)) | null;
  pre_tokenizer: (HfNode & ((text: string, options: { section_index: number }) => string[])) | null;
  model: ((words: string[]) => string[]) & { vocab: string[]; unk_token_id?: number };
  post_processor: ((tokens: string[], pair: null, addSpecialTokens: boolean) => { tokens: string[] }) | null;
  decoder: HfNode | null;
  encode(text: string, options: { add_special_tokens: boolean }): { ids: (number | undefined)[] };
  decode(ids: number[], options: { clean_up_tokenization_spaces: boolean }): string;
  token_to_id(token: string): number | undefined;
  id_to_token(id: number): string | undefined;
}

/** Where the package stands in NFKC for SentencePiece's own table, use the table. */
export function fixNormalizer(node: HfNode | null): void {
  if (node === null) return;
  for (const inner of node.normalizers ?? []) fixNormalizer(inner);
  const base64 = node.config?.precompiled_charsmap;
  const map = typeof base64 === 'string' ? readCharsmap(base64) : undefined;
  if (map) node.normalize = (text) => applyCharsmap(map, text);
}

/** Unicode's White_Space, which the library splits at; JavaScript's \s lacks U+0085 and has U+FEFF. */
const NOT_SPACE = /[^\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/g;

/** `json` is the entry of tokenizer.json that `node` was made from. */
export function fixPreTokenizer(node: HfNode | null, json: unknown): void {
  const { type, pretokenizers } = (json ?? {}) as { type?: string; pretokenizers?: unknown[] };
  if (node === null) return;
  node.tokenizers?.forEach((inner, i) => {
    fixPreTokenizer(inner, pretokenizers?.[i]);
  });
  if (type === 'WhitespaceSplit') node.pre_tokenize_text = (text) => text.match(NOT_SPACE) ?? [];
}

/**
 * The package's byte fallback drops byte-order marks and gives one U+FFFD for a run of invalid bytes; the library it
 * follows keeps the former and gives one a byte.
 */
export function fixDecoder(node: HfNode | null): void {
  if (node === null) return;
  for (const inner of node.decoders ?? []) fixDecoder(inner);
  if (node.config?.type === 'ByteFallback') node.decode_chain = fuseBytes;
}

function fuseBytes(tokens: string[]): string[] {
  const out: string[] = [];
  let run: number[] = [];
  const flush = (): void => {
    if (run.length > 0) out.push(textOfBytes(run));
    run = [];
  };
  for (const token of tokens) {
    const byte = /^<0x([0-9A-Fa-f]{2})>$/.exec(token)?.[1];
    if (byte !== undefined) run.push(Number.parseInt(byte, 16));
    else {
      flush();
      out.push(token);
    }
  }
  flush();
  return out;
}

function textOfBytes(bytes: number[]): string {
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(bytes));
  } catch {
    return '\ufffd'.repeat(bytes.length);
  }
}
