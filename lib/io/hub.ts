/** Models and adapters of the Hugging Face hub, in the cache that Hugging Face's own libraries share. */
import { readdir, readFile, stat } from 'node:fs/promises';
import { homedir } from 'node:os';
import { join } from 'node:path';
import { didYouMean, QLoRAError } from '../errors.js';
import { downloadBlob, linkSnapshot, storeRef } from './hub-cache.js';

export interface HubOptions {
  /** Use what the cache holds and ask nobody; default: whether HF_HUB_OFFLINE is set. */
  offline?: boolean;
  /** Branch, tag or commit; default 'main'. */
  revision?: string;
  signal?: AbortSignal;
  /** In bytes. */
  onProgress?: (done: number, total: number) => void;
}

type Kind = 'model' | 'adapter';
type Hub = typeof import('@huggingface/hub');

interface RemoteFile {
  readonly path: string;
  readonly size: number;
  /** Name of its blob: SHA-256 of a large file, git's SHA-1 of a small one. */
  readonly etag: string;
}

const wanted: Record<Kind, RegExp> = {
  model: /^(model[\w.-]*\.safetensors|[\w-]+(\.safetensors\.index)?\.json|[\w-]+\.jinja|tokenizer\.model|merges\.txt)$/,
  adapter: /^(adapter_model\.safetensors|adapter_config\.json|qlora_node\.json)$/,
};
const weights: Record<Kind, RegExp> = { model: /^model.*\.safetensors$/, adapter: /^adapter_model\.safetensors$/ };
const pickled = /\.(bin|pt|pth|ckpt)$/;
const hubName = /^[A-Za-z0-9][\w.-]*\/[A-Za-z0-9][\w.-]*$/;

/**
 * The folder of a model or an adapter: `source` itself where it is one, or cannot be the name of one on the hub; else
 * the snapshot of `owner/name` in the cache, downloaded where it is not there. Respected are HF_HUB_CACHE, HF_HOME,
 * HF_ENDPOINT, HF_TOKEN, HF_TOKEN_PATH and HF_HUB_OFFLINE. A download that was cut short goes on where it stopped.
 *
 * @param load imports @huggingface/hub, an optional peer
 * @throws ERR_QLORA_DEPENDENCY_MISSING, ERR_QLORA_HUB_OFFLINE (not in the cache), ERR_QLORA_HUB_ACCESS (gated, private
 *   or not there), ERR_QLORA_MODEL_NOT_FOUND, ERR_QLORA_ADAPTER_NOT_FOUND, ERR_QLORA_PICKLE, ERR_QLORA_DOWNLOAD_FAILED,
 *   ERR_QLORA_DISK_FULL, ERR_QLORA_WRITE_FAILED, the signal's reason
 */
export async function locate(
  source: string,
  kind: Kind,
  options: HubOptions = {},
  load: () => Promise<Hub> = () => import('@huggingface/hub'),
): Promise<string> {
  const there = await stat(source).catch(() => undefined);
  if (there || !hubName.test(source)) return source;
  try {
    return await fromHub(source, kind, options, load);
  } catch (error) {
    throw await asPath(error, source);
  }
}

async function fromHub(source: string, kind: Kind, options: HubOptions, load: () => Promise<Hub>): Promise<string> {
  const { revision = 'main', offline = isSet(process.env.HF_HUB_OFFLINE) } = options;
  if (!/^[\w.-]+(\/[\w.-]+)*$/.test(revision) || revision.split('/').includes('..')) {
    throw new QLoRAError(
      'ERR_QLORA_OPTION_INVALID',
      `revision must name a branch, a tag or a commit, got '${revision}'`,
      {
        hint: "Leave it out for 'main'.",
      },
    );
  }
  const repository = join(cacheFolder(), `models--${source.replace('/', '--')}`);
  if (offline) return cached(source, repository, revision);
  let hub: Hub;
  try {
    hub = await load();
  } catch (cause) {
    throw new QLoRAError(
      'ERR_QLORA_DEPENDENCY_MISSING',
      `there is no folder '${source}', and to download it from the hub the package @huggingface/hub is needed`,
      { hint: `npm install @huggingface/hub, or fetch it with: ${fetchCommand(source)}`, cause },
    );
  }
  return download(hub, source, kind, repository, revision, options);
}

/** What has the form owner/name may be a path with a mistake in it: where that is likely, the hint says so first. */
async function asPath(error: unknown, source: string): Promise<unknown> {
  if (!(error instanceof QLoRAError) || !error.message.includes('there is no folder')) return error;
  const [owner = '', name = ''] = source.split('/');
  const beside = await readdir(owner).catch(() => undefined);
  const near = beside && didYouMean(name, beside);
  const folder = near ? `Did you mean the folder '${owner}/${near}'?` : `The folder '${owner}' has no '${name}'.`;
  const what = beside ? folder : 'A relative path starts at the working directory of the process.';
  const hint = `If a folder was meant: is the path right? ${what} If a model of the hub: ${error.hint}`;
  return new QLoRAError(error.code, error.message, { hint, detail: error.detail, cause: error.cause });
}

const isSet = (value: string | undefined) => value !== undefined && /^(1|true|yes|on)$/i.test(value);
const hubHome = () =>
  process.env.HF_HOME ?? join(process.env.XDG_CACHE_HOME ?? join(homedir(), '.cache'), 'huggingface');
const cacheFolder = () => process.env.HF_HUB_CACHE ?? process.env.HUGGINGFACE_HUB_CACHE ?? join(hubHome(), 'hub');
const endpoint = () => (process.env.HF_ENDPOINT || 'https://huggingface.co').replace(/\/+$/, '');
const fetchCommand = (source: string) => `hf download ${source}`;

/** What the cache knows as that revision. A snapshot gets its ref when it is complete. */
async function cached(source: string, repository: string, revision: string): Promise<string> {
  const ref = await readFile(join(repository, 'refs', revision), 'utf8').catch(() => revision);
  const commit = ref.trim();
  const folder = join(repository, 'snapshots', commit);
  if (/^[0-9a-f]{40}$/.test(commit) && (await stat(folder).catch(() => undefined))) return folder;
  throw new QLoRAError(
    'ERR_QLORA_HUB_OFFLINE',
    `there is no folder '${source}', and the cache in ${repository} does not hold its revision '${revision}'`,
    { hint: `Fetch it while online, with offline: false and without HF_HUB_OFFLINE, or with: ${fetchCommand(source)}` },
  );
}

/** HF_TOKEN, or what Hugging Face's login stored. */
async function accessToken(): Promise<string | undefined> {
  if (process.env.HF_TOKEN) return process.env.HF_TOKEN.trim();
  const path = process.env.HF_TOKEN_PATH ?? join(hubHome(), 'token');
  return (await readFile(path, 'utf8').catch(() => '')).trim() || undefined;
}

async function download(
  hub: Hub,
  source: string,
  kind: Kind,
  repository: string,
  revision: string,
  { signal, onProgress }: HubOptions,
): Promise<string> {
  const token = await accessToken();
  const abortable: typeof fetch = (url, init) => fetch(url, signal ? { ...init, signal } : init);
  const common = { hubUrl: endpoint(), fetch: abortable, ...(token ? { accessToken: token } : {}) };
  const explain = (error: unknown) => hubError(error, source, kind, revision, token !== undefined, signal);
  let files: RemoteFile[] = [];
  let commit = '';
  try {
    const info = await hub.modelInfo({ name: source, revision, additionalFields: ['sha'], ...common });
    commit = info.sha;
    if (!/^[0-9a-f]{40}$/.test(commit)) throw new Error(`the hub names no commit, but ${JSON.stringify(commit)}`);
    const names: string[] = [];
    for await (const { type, path, size, oid, lfs } of hub.listFiles({ repo: source, revision: commit, ...common })) {
      names.push(path);
      const etag = lfs?.oid ?? oid ?? '';
      if (type === 'file' && wanted[kind].test(path) && /^[0-9a-f]{40,64}$/.test(etag))
        files.push({ path, size, etag });
    }
    refuseWithoutWeights(source, kind, names);
  } catch (error) {
    throw explain(error);
  }
  files = withoutCopies(files);
  const total = files.reduce((sum, file) => sum + file.size, 0);
  let before = 0;
  for (const file of files) {
    const progress = (bytes: number) => onProgress?.(before + bytes, total);
    const blob = { repository, etag: file.etag, size: file.size, signal };
    try {
      await downloadBlob(blob, progress, async (from) => {
        const body = await hub.downloadFile({ repo: source, path: file.path, revision: commit, ...common });
        if (!body) throw new Error(`${file.path} is not there any more`);
        return body.slice(from, file.size).stream();
      });
      await linkSnapshot(repository, commit, file.path, file.etag);
    } catch (error) {
      throw explain(error);
    }
    before += file.size;
  }
  return storeRef(repository, revision, commit);
}

/** Of a model that is there whole and in shards, the whole file is what is loaded. */
function withoutCopies(files: RemoteFile[]): RemoteFile[] {
  const whole = files.some(({ path }) => path === 'model.safetensors');
  return whole ? files.filter(({ path }) => !/^model-.*\.safetensors$/.test(path)) : files;
}

function refuseWithoutWeights(source: string, kind: Kind, names: readonly string[]): void {
  if (names.some((name) => weights[kind].test(name))) return;
  const pickle = names.find((name) => pickled.test(name));
  if (pickle) {
    throw new QLoRAError(
      'ERR_QLORA_PICKLE',
      `${source} holds its weights only as ${pickle}, a pickle, which can run code`,
      {
        hint:
          'Convert it once with Python: from transformers import AutoModelForCausalLM; ' +
          `AutoModelForCausalLM.from_pretrained("${source}").save_pretrained("folder", safe_serialization=True). Then load the folder.`,
      },
    );
  }
  const adapter = kind === 'model' && names.includes('adapter_config.json');
  throw new QLoRAError(
    kind === 'model' ? 'ERR_QLORA_MODEL_NOT_FOUND' : 'ERR_QLORA_ADAPTER_NOT_FOUND',
    `${source} on the hub holds no ${kind}`,
    {
      hint: adapter
        ? 'It is an adapter: load the model it belongs to, then the adapter with loadLora().'
        : 'Check the name: its files must be safetensors.',
    },
  );
}

/** What a failure becomes; errors of our own and the signal's reason stay as they are. */
function hubError(
  cause: unknown,
  source: string,
  kind: Kind,
  revision: string,
  hasToken: boolean,
  signal: AbortSignal | undefined,
): unknown {
  if (signal?.aborted) return signal.reason;
  if (cause instanceof QLoRAError) return cause;
  // A stream that breaks hands on a text alone.
  const { statusCode, message = String(cause) } = cause as { statusCode?: number; message?: string };
  const page = `${endpoint()}/${source}`;
  if (statusCode === 401 || statusCode === 403) {
    const again = hasToken ? 'Check that the token may read it' : 'Set HF_TOKEN to a token of your account';
    return new QLoRAError(
      'ERR_QLORA_HUB_ACCESS',
      `${page}: the hub answers ${statusCode}: it is gated, private, or not there, and there is no folder '${source}'`,
      { hint: `Check the name. Where it is gated, ask for access on ${page}. ${again}.`, cause },
    );
  }
  if (statusCode === 404) {
    return new QLoRAError(
      kind === 'model' ? 'ERR_QLORA_MODEL_NOT_FOUND' : 'ERR_QLORA_ADAPTER_NOT_FOUND',
      `there is no folder '${source}', and the hub at ${endpoint()} has none of that name with a revision '${revision}'`,
      { hint: 'Check its name and its revision.', cause },
    );
  }
  return new QLoRAError(
    'ERR_QLORA_DOWNLOAD_FAILED',
    `there is no folder '${source}', and ${page} cannot be downloaded: ${message}`,
    {
      hint: `Try again: it goes on where it stopped. What is in the cache loads with offline: true. By hand: ${fetchCommand(source)}`,
      cause,
    },
  );
}
