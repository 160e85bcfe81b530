/** Data sets by the names that LLaMA-Factory's dataset_info.json gives them, or by their paths. */
import { access } from 'node:fs/promises';
import { join } from 'node:path';
import { didYouMean, QLoRAError } from '../../errors.js';
import { isObject, type JsonObject, readJsonObject } from '../../io/json.js';

/** What a MixedDataset is made of. */
export interface DatasetSpec {
  source: string;
  format?: string;
  maxSamples?: number;
  weight?: number;
}

const infoName = 'dataset_info.json';
const defaultFolder = 'data';

/**
 * @param where the folder of dataset_info.json, and where the names stand, for messages
 * @throws ERR_QLORA_DATASET_NOT_FOUND, ERR_QLORA_OPTION_UNSUPPORTED
 */
export async function sourcesOf(
  names: readonly string[],
  where: { folder?: string; place: string },
  maxSamples?: number,
): Promise<DatasetSpec[]> {
  const folder = where.folder ?? defaultFolder;
  const info = await readInfo(folder, where.folder !== undefined);
  const specs: DatasetSpec[] = [];
  for (const name of names) {
    const entry = info[name];
    const spec = isObject(entry)
      ? described(name, entry, folder)
      : { source: await pathOf(name, folder, info, where.place) };
    specs.push(maxSamples === undefined ? spec : { ...spec, maxSamples });
  }
  return specs;
}

async function readInfo(folder: string, mustBe: boolean): Promise<JsonObject> {
  const path = join(folder, infoName);
  if (!mustBe && !(await exists(path))) return {};
  return readJsonObject(path);
}

async function pathOf(name: string, folder: string, info: JsonObject, place: string): Promise<string> {
  if (await exists(name)) return name;
  const near = didYouMean(name, Object.keys(info));
  throw new QLoRAError(
    'ERR_QLORA_DATASET_NOT_FOUND',
    `${place}: '${name}' is neither a path nor a data set of ${join(folder, infoName)}`,
    {
      hint: near ? `Did you mean '${near}'?` : `It names ${Object.keys(info).join(', ') || 'none'}.`,
      detail: { dataset: name },
    },
  );
}

async function exists(path: string): Promise<boolean> {
  return access(path).then(
    () => true,
    () => false,
  );
}

const sharegpt = { role_tag: 'from', content_tag: 'value', user_tag: 'human', assistant_tag: 'gpt' };
const openai = { role_tag: 'role', content_tag: 'content', user_tag: 'user', assistant_tag: 'assistant' };

/** What the columns and tags of an entry must be for one of our formats to read it. */
const formats: readonly { format: string; columns: Record<string, string>; tags: Record<string, string> }[] = [
  { format: 'alpaca', columns: { prompt: 'instruction', query: 'input', response: 'output' }, tags: {} },
  { format: 'dolly', columns: { prompt: 'instruction', query: 'context', response: 'response' }, tags: {} },
  { format: 'prompt-completion', columns: { prompt: 'prompt', response: 'completion' }, tags: {} },
  { format: 'longform', columns: { prompt: 'input', response: 'output' }, tags: {} },
  { format: 'text', columns: { prompt: 'text' }, tags: {} },
  { format: 'sharegpt', columns: { messages: 'conversations' }, tags: sharegpt },
  { format: 'openai', columns: { messages: 'messages' }, tags: openai },
];
/** By `formatting`: what stands where an entry says nothing. */
const unsaid: Readonly<Record<string, { columns: Record<string, string>; tags: Record<string, string> }>> = {
  alpaca: { columns: { prompt: 'instruction', query: 'input', response: 'output' }, tags: {} },
  sharegpt: { columns: { messages: 'conversations' }, tags: sharegpt },
  openai: { columns: { messages: 'messages' }, tags: openai },
};

function described(name: string, entry: JsonObject, folder: string): DatasetSpec {
  const place = `${join(folder, infoName)}: ${name}`;
  const unsupported = (what: string, hint: string) =>
    new QLoRAError('ERR_QLORA_OPTION_UNSUPPORTED', `${place}: ${what}`, { hint, detail: { dataset: name } });
  const { file_name: file, formatting = 'alpaca', hf_hub_url: hub } = entry;
  if (typeof file !== 'string') {
    throw unsupported(
      'it names no file_name, and only files are read',
      typeof hub === 'string' ? `Fetch it with \`hf download --repo-type dataset ${hub}\`.` : 'Give it a file_name.',
    );
  }
  const defaults = Object.hasOwn(unsaid, String(formatting)) ? unsaid[String(formatting)] : undefined;
  if (!defaults)
    throw unsupported(`formatting '${formatting}' is not known`, `There are ${Object.keys(unsaid).join(', ')}.`);
  if (entry.ranking === true) throw unsupported('ranking is for preference training', 'Use a data set of answers.');
  const columns = isObject(entry.columns) ? withoutNull(entry.columns) : defaults.columns;
  const tags = { ...defaults.tags, ...(isObject(entry.tags) ? withoutNull(entry.tags) : {}) };
  const fits = formats.find(
    (f) =>
      Object.entries(columns).every(([column, field]) => f.columns[column] === field) &&
      Object.keys(f.columns).every((column) => column === 'query' || columns[column] !== undefined) &&
      Object.entries(f.tags).every(([tag, value]) => tags[tag] === value),
  );
  if (!fits) {
    throw unsupported(
      `no data format has the columns ${JSON.stringify(columns)}`,
      `Rename the fields to those of ${formats.map((f) => f.format).join(', ')}.`,
    );
  }
  return { source: join(folder, file), format: fits.format };
}

function withoutNull(object: JsonObject): Record<string, string> {
  return Object.fromEntries(Object.entries(object).filter(([, value]) => value !== null)) as Record<string, string>;
}
