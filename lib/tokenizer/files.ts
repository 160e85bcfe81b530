import { readdir, readFile } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { QLoRAError } from '../errors.js';

export interface AddedTokenEntry {
  id: number;
  content: string;
  special: boolean;
  lstrip: boolean;
  rstrip: boolean;
  normalized: boolean;
  single_word: boolean;
}

/** tokenizer.json as far as it is checked; the rest goes to the tokenizers package as it is. */
export interface TokenizerJson extends Record<string, unknown> {
  model: Record<string, unknown>;
  added_tokens: AddedTokenEntry[];
}

export interface TokenizerFiles {
  directory: string;
  json: TokenizerJson;
  config: Record<string, unknown>;
  /** Named chat templates; the one that is used by default is 'default'. */
  chatTemplates: ReadonlyMap<string, string>;
}

/** A vocabulary beyond this is a lie that would make an array of as many slots. */
const MAX_TOKEN_ID = 2 ** 24;
const ROLES = ['bos_token', 'eos_token', 'pad_token', 'unk_token', 'additional_special_tokens'] as const;

/** Reads what a Hugging Face model folder says of its tokenizer. */
export async function readTokenizerFiles(directory: string): Promise<TokenizerFiles> {
  const text = await readOptional(join(directory, 'tokenizer.json'));
  if (text === undefined) throw await missing(directory);
  const json = checkTokenizerJson(parseObject(text, directory, 'tokenizer.json'), directory);
  const config = await readObject(directory, 'tokenizer_config.json');
  const map = await readObject(directory, 'special_tokens_map.json');
  for (const role of ROLES) if (config[role] === undefined && map[role] !== undefined) config[role] = map[role];
  addConfiguredTokens(json, config);
  return { directory, json, config, chatTemplates: await readChatTemplates(directory, config) };
}

/** The content of a token entry, which is a string or an object with `content`. */
export function tokenContent(entry: unknown): string | undefined {
  if (typeof entry === 'string') return entry;
  if (typeof entry !== 'object' || entry === null) return undefined;
  const { content } = entry as { content?: unknown };
  return typeof content === 'string' ? content : undefined;
}

export function invalidTokenizer(directory: string, what: string, cause?: unknown): QLoRAError {
  return new QLoRAError('ERR_QLORA_TOKENIZER_INVALID', `The tokenizer in ${directory} cannot be read: ${what}`, {
    hint: 'Download tokenizer.json and tokenizer_config.json of the model again.',
    detail: { directory },
    cause,
  });
}

async function readOptional(path: string): Promise<string | undefined> {
  try {
    return (await readFile(path, 'utf8')).replace(/^\ufeff/, '');
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT' || code === 'ENOTDIR') return undefined;
    throw new QLoRAError('ERR_QLORA_IO', `Cannot read ${path}: ${(error as Error).message}`, {
      hint: 'Check that the file is readable.',
      detail: { path },
      cause: error,
    });
  }
}

async function readObject(directory: string, name: string): Promise<Record<string, unknown>> {
  const text = await readOptional(join(directory, name));
  return text === undefined ? {} : parseObject(text, directory, name);
}

function parseObject(text: string, directory: string, name: string): Record<string, unknown> {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw invalidTokenizer(directory, `${name} is not JSON (${(error as Error).message})`, error);
  }
  if (!isObject(value)) throw invalidTokenizer(directory, `${name} must hold an object, it holds ${kindOf(value)}`);
  return value;
}

async function missing(directory: string): Promise<QLoRAError> {
  const names = await readdir(directory).catch(() => [] as string[]);
  const other = names.find((name) => /\.model$|^vocab\.(json|txt)$|^tekken\.json$/.test(name));
  const hint =
    other === undefined
      ? 'Copy tokenizer.json and tokenizer_config.json of the model into the folder; without them only ids can be used.'
      : `${other} is an older form: AutoTokenizer.from_pretrained(folder).save_pretrained(folder) in transformers writes tokenizer.json.`;
  return new QLoRAError('ERR_QLORA_TOKENIZER_MISSING', `There is no tokenizer.json in ${directory}`, {
    hint,
    detail: { directory, missing: 'tokenizer.json' },
  });
}

function checkTokenizerJson(json: Record<string, unknown>, directory: string): TokenizerJson {
  const { model } = json;
  if (!isObject(model)) throw invalidTokenizer(directory, `tokenizer.json has no model (${kindOf(model)})`);
  const { vocab } = model;
  if (Array.isArray(vocab)) {
    const bad = vocab.findIndex((e) => !Array.isArray(e) || typeof e[0] !== 'string' || typeof e[1] !== 'number');
    if (bad >= 0) throw invalidTokenizer(directory, `model.vocab[${bad}] of tokenizer.json must be [string, number]`);
  } else if (isObject(vocab)) {
    for (const token in vocab) checkId(vocab[token], `the id of ${JSON.stringify(token)}`, directory);
  } else throw invalidTokenizer(directory, `model.vocab of tokenizer.json is ${kindOf(vocab)}`);
  for (const part of ['normalizer', 'pre_tokenizer', 'post_processor', 'decoder']) json[part] ??= null;
  const tokens = json.added_tokens ?? [];
  if (!Array.isArray(tokens)) throw invalidTokenizer(directory, 'added_tokens of tokenizer.json must be an array');
  json.added_tokens = tokens.map((entry, i) => checkAdded(entry, `added_tokens[${i}]`, directory));
  return json as TokenizerJson;
}

function checkAdded(entry: unknown, where: string, directory: string): AddedTokenEntry {
  if (!isObject(entry) || typeof entry.content !== 'string' || entry.content === '') {
    throw invalidTokenizer(directory, `${where} must have a content that is not empty`);
  }
  const id = checkId(entry.id, `the id of ${where}`, directory);
  const flag = (name: string): boolean => entry[name] === true;
  return {
    id,
    content: entry.content,
    special: flag('special'),
    lstrip: flag('lstrip'),
    rstrip: flag('rstrip'),
    normalized: flag('normalized'),
    single_word: flag('single_word'),
  };
}

function checkId(id: unknown, what: string, directory: string): number {
  if (typeof id === 'number' && Number.isInteger(id) && id >= 0 && id < MAX_TOKEN_ID) return id;
  throw invalidTokenizer(directory, `${what} must be an integer from 0 to ${MAX_TOKEN_ID - 1}, it is ${String(id)}`);
}

/** tokenizer_config.json may list tokens that tokenizer.json lacks; transformers adds them, so they count here too. */
function addConfiguredTokens(json: TokenizerJson, config: Record<string, unknown>): void {
  const listed = config.added_tokens_decoder;
  if (!isObject(listed)) return;
  const known = new Set(json.added_tokens.map((token) => token.id));
  for (const [id, entry] of Object.entries(listed)) {
    if (!isObject(entry) || typeof entry.content !== 'string' || entry.content === '') continue;
    const number = Number(id);
    if (known.has(number) || !Number.isInteger(number) || number < 0 || number >= MAX_TOKEN_ID) continue;
    json.added_tokens.push(checkAdded({ ...entry, id: number }, `added_tokens_decoder[${id}]`, ''));
  }
}

/** chat_template.jinja wins over the field of tokenizer_config.json, as in transformers. */
async function readChatTemplates(directory: string, config: Record<string, unknown>): Promise<Map<string, string>> {
  const templates = new Map<string, string>();
  const field = config.chat_template;
  if (typeof field === 'string') templates.set('default', field);
  else if (Array.isArray(field)) {
    for (const entry of field as unknown[]) {
      if (isObject(entry) && typeof entry.name === 'string' && typeof entry.template === 'string') {
        templates.set(entry.name, entry.template);
      }
    }
  }
  const file = await readOptional(join(directory, 'chat_template.jinja'));
  if (file !== undefined) templates.set('default', file);
  const folder = join(directory, 'additional_chat_templates');
  for (const name of (await readdir(folder).catch(() => [] as string[])).sort()) {
    const text = name.endsWith('.jinja') ? await readOptional(join(folder, name)) : undefined;
    if (text !== undefined) templates.set(basename(name, '.jinja'), text);
  }
  return templates;
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function kindOf(value: unknown): string {
  return value === undefined
    ? 'missing'
    : value === null
      ? 'null'
      : Array.isArray(value)
        ? 'an array'
        : `a ${typeof value}`;
}
