/** Which files of a folder are its training data: as Hugging Face lays data sets out, or all that can be read. */
import { readdir, readFile, stat } from 'node:fs/promises';
import { basename, join, relative, sep } from 'node:path';
import { parse as parseYaml } from 'yaml';
import { unreadable, wrongFormat } from './data-errors.js';
import { matchesPattern } from './glob.js';
import { dataExtension, supportedExtensions } from './readers.js';

export interface DataFiles {
  /** In the order in which they are read. */
  files: string[];
  /** What was chosen, where there was a choice. */
  notes: string[];
}

/** What Hugging Face and others put beside the data. */
const notData = new Set(['dataset_info.json', 'dataset_infos.json', 'dataset_dict.json', 'state.json', 'package.json']);
const mostFiles = 100_000;
const mostCardBytes = 2 ** 22;

/** The names that Hugging Face's own loader knows for each split. */
const splitWords: readonly (readonly [string, RegExp])[] = [
  ['train', /(^|[-._ 0-9/])(train|training)([-._ 0-9/]|$)/],
  ['validation', /(^|[-._ 0-9/])(validation|valid|dev|val)([-._ 0-9/]|$)/],
  ['test', /(^|[-._ 0-9/])(test|testing|eval|evaluation)([-._ 0-9/]|$)/],
];

/**
 * The files of a path: itself, or of a folder its training split.
 *
 * @throws ERR_QLORA_DATASET_NOT_FOUND, ERR_QLORA_IO, ERR_QLORA_DATASET_FORMAT
 */
export async function dataFiles(path: string): Promise<DataFiles> {
  const info = await stat(path).catch((error: NodeJS.ErrnoException) => {
    throw unreadable(path, error);
  });
  if (info.isFile()) return { files: [path], notes: [] };
  if (!info.isDirectory()) throw wrongFormat(`${path} is neither a file nor a folder`, path);
  const names = await namesBelow(path);
  const data = names.filter((name) => dataExtension(name) !== undefined && !notData.has(basename(name)));
  if (data.length === 0) {
    const arrow = names.some((name) => name.endsWith('.arrow'));
    const found = names.slice(0, 10).join(', ') || 'nothing';
    throw wrongFormat(
      `The folder ${path} holds no data file: expected ${supportedExtensions()}, found ${found}`,
      path,
      arrow ? 'Arrow files are not read: dataset.to_parquet(...) in Python writes them as parquet.' : undefined,
    );
  }
  const notes: string[] = [];
  const described = await fromCard(path, data, notes);
  const files = described ?? bySplit(path, data, notes);
  return { files: files.map((name) => join(path, name)), notes };
}

/** Paths of the files in a folder and those below, relative to it, with / between names, in order. Hidden ones are left out. */
async function namesBelow(folder: string): Promise<string[]> {
  const names: string[] = [];
  const visit = async (directory: string, depth: number): Promise<void> => {
    const entries = await readdir(directory, { withFileTypes: true }).catch((error: NodeJS.ErrnoException) => {
      throw unreadable(directory, error);
    });
    for (const entry of entries) {
      if (entry.name.startsWith('.')) continue;
      const path = join(directory, entry.name);
      if (entry.isDirectory() && depth < 16) await visit(path, depth + 1);
      // Hugging Face's cache has links to files; folders behind links are not entered.
      else if (entry.isFile() || (entry.isSymbolicLink() && (await stat(path).catch(() => undefined))?.isFile())) {
        names.push(relative(folder, path).split(sep).join('/'));
      }
      if (names.length > mostFiles)
        throw wrongFormat(`The folder ${folder} holds more than ${mostFiles} files`, folder);
    }
  };
  await visit(folder, 0);
  return names.sort();
}

function bySplit(folder: string, names: readonly string[], notes: string[]): string[] {
  const splits = new Map<string | undefined, string[]>();
  for (const name of names) {
    const split = splitWords.find(([, words]) => words.test(name.toLowerCase().replace(/(\.\w+){1,2}$/, '')))?.[0];
    splits.set(split, [...(splits.get(split) ?? []), name]);
  }
  return takeTrain(folder, splits, notes);
}

/** The split 'train'; where there is none, what belongs to no split. */
function takeTrain(folder: string, splits: ReadonlyMap<string | undefined, string[]>, notes: string[]): string[] {
  const taken = splits.get('train') ?? splits.get(undefined);
  const others = [...splits.keys()].filter((name) => name !== undefined && name !== 'train');
  if (!taken || taken.length === 0) {
    throw wrongFormat(
      `The folder ${folder} has no split 'train', only ${others.join(', ') || 'nothing'}`,
      folder,
      'Pass the path of the file that you mean.',
    );
  }
  if (splits.has('train')) {
    const rest = others.length > 0 ? `; left out: ${others.join(', ')}` : '';
    notes.push(`taking the split 'train' of ${folder} (${taken.length} file${taken.length === 1 ? '' : 's'})${rest}`);
  }
  return taken;
}

interface CardConfig {
  config_name?: unknown;
  data_files?: unknown;
  default?: unknown;
}

/** What the front matter of README.md says, where it says anything of files. */
async function fromCard(folder: string, names: readonly string[], notes: string[]): Promise<string[] | undefined> {
  const configs = await readConfigs(folder);
  const usable = configs.filter(({ data_files }) => data_files !== undefined);
  const chosen =
    usable.find((config) => config.default === true) ??
    usable.find(({ config_name }) => config_name === 'default') ??
    usable[0];
  if (!chosen) return undefined;
  const name = String(chosen.config_name ?? 'default').slice(0, 80);
  if (usable.length > 1) {
    const others = usable.filter((config) => config !== chosen).map((c) => String(c.config_name).slice(0, 80));
    notes.push(`taking the configuration '${name}' of ${folder}; left out: ${others.slice(0, 20).join(', ')}`);
  }
  const splits = new Map<string | undefined, string[]>();
  for (const [split, patterns] of splitsOf(chosen.data_files)) {
    const found = names.filter((file) => patterns.some((pattern) => matchesPattern(file, pattern)));
    splits.set(split, [...(splits.get(split) ?? []), ...found]);
  }
  return takeTrain(folder, splits, notes);
}

async function readConfigs(folder: string): Promise<CardConfig[]> {
  const path = join(folder, 'README.md');
  const size = (await stat(path).catch(() => undefined))?.size;
  if (size === undefined || size > mostCardBytes) return [];
  const text = await readFile(path, 'utf8').catch((error: NodeJS.ErrnoException) => {
    throw unreadable(path, error);
  });
  const front = /^\ufeff?---\r?\n([\s\S]*?)\r?\n---/.exec(text)?.[1];
  if (front === undefined) return [];
  let card: unknown;
  try {
    card = parseYaml(front, { maxAliasCount: 100 });
  } catch (error) {
    throw wrongFormat(
      `The front matter of ${path} is no YAML: ${(error as Error).message.split('\n')[0]}`,
      path,
      'Correct it, or pass the path of a file.',
    );
  }
  const { configs } = (typeof card === 'object' && card !== null ? card : {}) as { configs?: unknown };
  if (!Array.isArray(configs)) return [];
  return configs.filter((config) => typeof config === 'object' && config !== null);
}

/** `data_files` is a pattern, a list of patterns, a list of { split, path }, or an object of patterns by split. */
function splitsOf(dataFiles: unknown): [string | undefined, string[]][] {
  if (typeof dataFiles === 'string') return [['train', [dataFiles]]];
  if (Array.isArray(dataFiles)) {
    return dataFiles.map((entry: unknown) => {
      if (typeof entry !== 'object' || entry === null) return ['train', strings(entry)];
      const { split, path } = entry as { split?: unknown; path?: unknown };
      return [typeof split === 'string' ? split : 'train', strings(path)];
    });
  }
  if (typeof dataFiles !== 'object' || dataFiles === null) return [];
  return Object.entries(dataFiles).map(([split, path]) => [split, strings(path)]);
}

function strings(value: unknown): string[] {
  return [value].flat().filter((entry) => typeof entry === 'string');
}
