/** A configuration file, YAML or JSON, as a list of keys with the lines they stand on. */
import { isMap, isScalar, LineCounter, type Node, type Pair, parseDocument } from 'yaml';
import { QLoRAError } from '../../errors.js';
import { readText } from '../../io/json.js';

/** A key and its value as somebody wrote them. */
export interface Setting {
  /** With dots where it is nested: lora.r. */
  key: string;
  value: unknown;
  /** For messages: 'train.yaml:12', or the flag. */
  place: string;
}

const mostBytes = 2 ** 20;
const ofRows = /\.(jsonl|csv|tsv|parquet)(\.gz)?$/i;

/**
 * @param nested names whose maps are settings of their own, as lora of lora.r
 * @throws ERR_QLORA_CONFIG_FILE, which names the line, and what readText throws
 */
export async function readSettings(path: string, nested: ReadonlySet<string>): Promise<Setting[]> {
  if (ofRows.test(path)) throw broken(path, 'that is a file of rows, not a configuration');
  const text = await readText(path, mostBytes);
  const lines = new LineCounter();
  const document = parseDocument(text, { lineCounter: lines, prettyErrors: false });
  const [error] = document.errors;
  if (error) throw broken(`${path}:${lines.linePos(error.pos[0]).line}`, error.message);
  if (document.contents === null) return [];
  if (!isMap(document.contents)) throw broken(path, 'it must hold keys and values');

  const settings: Setting[] = [];
  const collect = (pairs: readonly Pair[], prefix: string) => {
    for (const pair of pairs) {
      const name = isScalar(pair.key) ? String(pair.key.value) : String(pair.key);
      const key = prefix + name;
      const offset = (pair.key as Node | null)?.range?.[0] ?? 0;
      const place = `${path}:${lines.linePos(offset).line}`;
      if (isMap(pair.value) && nested.has(key)) collect(pair.value.items, `${key}.`);
      else settings.push({ key, value: plain(pair.value, document, place), place });
    }
  };
  collect(document.contents.items, '');
  return settings;
}

function plain(node: unknown, document: ReturnType<typeof parseDocument>, place: string): unknown {
  try {
    return (node as Node | null)?.toJS(document) ?? null;
  } catch (error) {
    throw broken(place, (error as Error).message);
  }
}

function broken(place: string, what: string): QLoRAError {
  return new QLoRAError('ERR_QLORA_CONFIG_FILE', `${place}: ${what}`, {
    hint: 'A configuration is YAML or JSON, one `key: value` a line; rows go to --dataset.',
  });
}
