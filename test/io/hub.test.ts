/** Models of the hub, against one on the loopback address. */
import { createHash } from 'node:crypto';
import { lstatSync, mkdirSync, readdirSync, readFileSync, readlinkSync, rmSync, writeFileSync } from 'node:fs';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import t, { type Test } from 'tap';
import { QLoRATrainer, QuantizedModel } from '../../lib/index.js';
import { locate } from '../../lib/io/hub.js';
import { packageRoot, referencesDir } from '../support/references.js';

const demo = join(packageRoot(), 'examples', 'demo', 'model');
const adapterFolder = join(referencesDir('models'), 'llama', 'adapter');
const commit = 'c0ffee'.padEnd(40, '0');
const source = 'org/tiny-model';

const contentOf = (folder: string) =>
  Object.fromEntries(
    readdirSync(folder).flatMap((name) =>
      /\.(json|safetensors)$/.test(name) ? [[name, readFileSync(join(folder, name))]] : [],
    ),
  );
const sha256 = (bytes: Buffer) => createHash('sha256').update(bytes).digest('hex');
const gitName = (bytes: Buffer) => createHash('sha1').update(`blob ${bytes.length}\0`).update(bytes).digest('hex');
const etagOf = (name: string, bytes: Buffer) => (name.endsWith('.safetensors') ? sha256(bytes) : gitName(bytes));

/** What the hub does with the body of a file: how many bytes it sends before it hangs up, or a status instead. */
type Trouble = (path: string, from: number) => number | undefined;

class FakeHub {
  readonly requests: { path: string; range: string | undefined; authorization: string | undefined }[] = [];
  files: Record<string, Buffer> = contentOf(demo);
  status = 200;
  trouble: Trouble = () => undefined;
  #server!: Server;

  async listen(): Promise<string> {
    this.#server = createServer((request, response) => {
      const { pathname: path } = new URL(request.url ?? '', 'http://x');
      const { range, authorization } = request.headers;
      this.requests.push({ path, range, authorization });
      const json = (value: unknown, status = 200) =>
        response.writeHead(status, { 'content-type': 'application/json' }).end(JSON.stringify(value));
      if (this.status !== 200) return json({ error: 'no' }, this.status);
      if (path === `/api/models/${source}/revision/main` || path === `/api/models/${source}/revision/v1`) {
        return json({ _id: '1', id: source, sha: commit, lastModified: '2026-01-01' });
      }
      if (path === `/api/models/${source}/tree/${commit}`) {
        return json(
          Object.entries(this.files).map(([name, bytes]) => ({
            type: 'file',
            path: name,
            size: bytes.length,
            oid: gitName(bytes),
            ...(name.endsWith('.safetensors')
              ? { lfs: { oid: sha256(bytes), size: bytes.length, pointerSize: 1 } }
              : {}),
          })),
        );
      }
      const name = path.split(`/${source}/resolve/${commit}/`)[1];
      const bytes = name === undefined ? undefined : this.files[name];
      if (!name || !bytes) return json({ error: 'Not found' }, 404);
      const [from, to] = /bytes=(\d+)-(\d+)/
        .exec(range ?? '')
        ?.slice(1)
        .map(Number) ?? [0, bytes.length - 1];
      const part = bytes.subarray(from, (to as number) + 1);
      const cut = part.length > 1 ? this.trouble(name, from as number) : undefined;
      response.writeHead(range ? 206 : 200, {
        etag: `"${etagOf(name, bytes)}"`,
        'content-length': part.length,
        ...(range ? { 'content-range': `bytes ${from}-${to}/${bytes.length}` } : {}),
      });
      if (cut === undefined) return response.end(part);
      response.write(part.subarray(0, cut), () => setImmediate(() => response.destroy()));
    });
    await new Promise<void>((resolve) => this.#server.listen(0, '127.0.0.1', resolve));
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  /** Of bodies, without the probe for size and etag. */
  ranges(name: string): (string | undefined)[] {
    return this.requests
      .filter(({ path, range }) => path.endsWith(`/${name}`) && range !== 'bytes=0-0')
      .map((r) => r.range);
  }

  close(): Promise<unknown> {
    this.#server.closeAllConnections();
    return new Promise((resolve) => this.#server.close(resolve));
  }
}

/** A hub and an empty cache, with the environment of a test. */
async function setUp(t: Test, env: Record<string, string> = {}): Promise<{ hub: FakeHub; repository: string }> {
  const hub = new FakeHub();
  const home = t.testdir({});
  const cleared = { HF_HUB_CACHE: undefined, HUGGINGFACE_HUB_CACHE: undefined, HF_TOKEN: undefined };
  const settings = {
    ...cleared,
    HF_HUB_OFFLINE: undefined,
    HF_TOKEN_PATH: undefined,
    HF_HOME: home,
    HF_ENDPOINT: await hub.listen(),
    ...env,
  };
  const before = Object.keys(settings).map((key) => [key, process.env[key]] as const);
  const set = (key: string, value: string | undefined) => {
    if (value === undefined) delete process.env[key];
    else process.env[key] = value;
  };
  for (const [key, value] of Object.entries(settings)) set(key, value);
  t.teardown(async () => {
    for (const [key, value] of before) set(key, value);
    await hub.close();
  });
  return { hub, repository: join(home, 'hub', 'models--org--tiny-model') };
}

t.test("a model by its name, in Hugging Face's cache", async (t) => {
  const { hub, repository } = await setUp(t, { HF_TOKEN: 'hf_secret' });
  const unwanted = ['pytorch_model.bin', 'consolidated.safetensors', 'README.md', '../evil.json', 'onnx/model.json'];
  for (const name of unwanted) hub.files[name] = Buffer.from('x');
  const progress: { phase: string; done: number; total: number }[] = [];
  await using model = await QuantizedModel.load(source, { onProgress: (p) => progress.push(p) });
  t.match(readdirSync(repository).sort(), ['blobs', 'refs', 'snapshots']);
  t.equal(readFileSync(join(repository, 'refs', 'main'), 'utf8'), commit);
  const snapshot = join(repository, 'snapshots', commit);
  const expected = contentOf(demo);
  t.same(readdirSync(snapshot).sort(), Object.keys(expected).sort());
  for (const [name, bytes] of Object.entries(expected)) {
    t.ok(lstatSync(join(snapshot, name)).isSymbolicLink());
    t.equal(readlinkSync(join(snapshot, name)), join('..', '..', 'blobs', etagOf(name, bytes)));
    t.ok(readFileSync(join(snapshot, name)).equals(bytes), name);
  }
  t.ok(hub.requests.every(({ authorization }) => authorization === 'Bearer hf_secret'));
  const downloads = progress.filter(({ phase }) => phase === 'download');
  t.equal(downloads.at(-1)?.done, downloads.at(-1)?.total, 'progress ends at the total');

  await using local = await QuantizedModel.load(demo);
  t.same(await model.logits([5, 6, 7]), await local.logits([5, 6, 7]));
  await model.addLora('a', { r: 2 }).save(join(t.testdirName, 'adapter'));
  t.match(readFileSync(join(t.testdirName, 'adapter', 'adapter_config.json'), 'utf8'), /"org\/tiny-model"/);

  // Asked again, only what changed is fetched; offline nobody is asked.
  hub.requests.length = 0;
  await (await QuantizedModel.load(source)).dispose();
  t.notOk(hub.requests.some(({ path }) => path.includes('/resolve/')));
  hub.requests.length = 0;
  await (await QuantizedModel.load(source, { offline: true })).dispose();
  process.env.HF_HUB_OFFLINE = '1';
  await (await QuantizedModel.load(source)).dispose();
  await using trainer = await QLoRATrainer.create({
    model: source,
    offline: true,
    dataset: [{ text: 'a' }],
    outputDir: join(t.testdirName, 'out'),
  });
  t.equal(trainer.model.core.directory, snapshot);
  t.same(hub.requests, []);
  await t.rejects(QuantizedModel.load(source, { revision: 'v1' }), { code: 'ERR_QLORA_HUB_OFFLINE' });
  t.equal(await locate(source, 'model', { offline: false, revision: 'v1' }), snapshot);
  t.equal(await locate(source, 'model', { revision: commit }), snapshot);
});

t.test('an adapter by its name', async (t) => {
  const { hub } = await setUp(t);
  const outputDir = join(t.testdirName, 'out');
  hub.files = contentOf(adapterFolder);
  await using model = await QuantizedModel.load(join(referencesDir('models'), 'llama'), { quantization: 'none' });
  await model.loadLora('theirs', source);
  await model.loadLora('local', adapterFolder);
  const ids = [1, 2, 3];
  t.same(await model.logits(ids, { adapter: 'theirs' }), await model.logits(ids, { adapter: 'local' }));
  const unknown = { code: 'ERR_QLORA_HUB_OFFLINE', message: /org\/other/ };
  hub.requests.length = 0;
  await using offline = await QuantizedModel.load(demo, { offline: true });
  await t.rejects(offline.loadLora('a', 'org/other'), unknown, 'a model that asked no hub asks none for its adapters');
  const options = { model: demo, offline: true, initialAdapter: 'org/other', dataset: [{ text: 'a' }], outputDir };
  await t.rejects(QLoRATrainer.create(options), unknown);
  await t.rejects(QLoRATrainer.plan(options), unknown);
  t.same(hub.requests, []);
  await t.rejects(QuantizedModel.load(source), {
    code: 'ERR_QLORA_MODEL_NOT_FOUND',
    message: /holds no model/,
    hint: /loadLora/,
  });
});

t.test('a connection that is cut is gone on with', async (t) => {
  const { hub, repository } = await setUp(t);
  const name = 'model.safetensors';
  const bytes = hub.files[name] as Buffer;
  let cuts = 3;
  hub.trouble = (path) => (path === name && cuts-- > 0 ? 40_000 : undefined);
  const folder = await locate(source, 'model');
  t.ok(readFileSync(join(folder, name)).equals(bytes));
  const starts = hub.ranges(name).map((range) => Number(/bytes=(\d+)/.exec(range ?? '')?.[1] ?? 0));
  t.equal(starts.length, 4, 'three were cut');
  t.ok(
    starts.every((start, i) => i === 0 || start > (starts[i - 1] as number)),
    `each began where the one before ended: ${starts}`,
  );

  // Another process had begun.
  const blob = join(repository, 'blobs', sha256(bytes));
  rmSync(join(folder, name));
  rmSync(blob);
  writeFileSync(`${blob}.incomplete`, bytes.subarray(0, 123_456));
  hub.requests.length = 0;
  await locate(source, 'model');
  t.same(hub.ranges(name), [`bytes=123456-${bytes.length - 1}`]);
  t.ok(readFileSync(join(folder, name)).equals(bytes));

  // What it left was damaged.
  rmSync(blob);
  rmSync(join(folder, name));
  writeFileSync(`${blob}.incomplete`, Buffer.alloc(1000, 1));
  await t.rejects(locate(source, 'model'), { code: 'ERR_QLORA_DOWNLOAD_FAILED', message: /has the hash/ });
  t.ok((await locate(source, 'model')).endsWith(commit), 'and is not gone on with again');

  // It never gets anywhere.
  rmSync(blob);
  rmSync(join(folder, name));
  hub.trouble = (path) => (path === name ? 0 : undefined);
  await t.rejects(locate(source, 'model'), { code: 'ERR_QLORA_DOWNLOAD_FAILED', hint: /goes on where it stopped/ });

  // Stopped on purpose, it keeps what came.
  hub.trouble = () => undefined;
  const abort = new AbortController();
  const reason = new Error('enough');
  const onProgress = (done: number) => {
    if (done > 300_000) abort.abort(reason);
  };
  await t.rejects(locate(source, 'model', { signal: abort.signal, onProgress }), reason);
  t.ok(lstatSync(`${blob}.incomplete`).size > 0);
});

t.test('what cannot be had', async (t) => {
  const { hub, repository } = await setUp(t);
  const load = () => QuantizedModel.load(source);
  hub.status = 404;
  await t.rejects(load(), { code: 'ERR_QLORA_MODEL_NOT_FOUND', message: /no folder 'org\/tiny-model', and the hub/ });
  hub.status = 401;
  const gated = /ask for access on http:.*\/org\/tiny-model/;
  await t.rejects(load(), { code: 'ERR_QLORA_HUB_ACCESS', message: /gated/, hint: gated });
  await t.rejects(load(), { code: 'ERR_QLORA_HUB_ACCESS', hint: /Set HF_TOKEN/ });
  mkdirSync(join(process.env.HF_HOME as string), { recursive: true });
  writeFileSync(join(process.env.HF_HOME as string, 'token'), 'hf_stored\n');
  hub.status = 403;
  await t.rejects(load(), { code: 'ERR_QLORA_HUB_ACCESS', hint: /Check that the token may read it/ });
  t.equal(hub.requests.at(-1)?.authorization, 'Bearer hf_stored', "the login's token");
  hub.status = 500;
  await t.rejects(load(), { code: 'ERR_QLORA_DOWNLOAD_FAILED', hint: /hf download org\/tiny-model/ });
  process.env.HF_TOKEN = 'not a token';
  await t.rejects(load(), { code: 'ERR_QLORA_DOWNLOAD_FAILED', message: /hf_/ });
  delete process.env.HF_TOKEN;
  hub.status = 200;
  hub.files = { 'config.json': Buffer.from('{}'), 'pytorch_model.bin': Buffer.from('x') };
  await t.rejects(load(), { code: 'ERR_QLORA_PICKLE', hint: /save_pretrained/ });
  hub.files = { 'README.md': Buffer.from('x') };
  await t.rejects(load(), { code: 'ERR_QLORA_MODEL_NOT_FOUND' });
  await t.rejects(QuantizedModel.load(source, { revision: '../../x' }), { code: 'ERR_QLORA_OPTION_INVALID' });
  await t.rejects(QuantizedModel.load(source, { offline: true }), {
    code: 'ERR_QLORA_HUB_OFFLINE',
    hint: /hf download org\/tiny-model/,
  });
  t.throws(() => lstatSync(join(repository, 'refs')), 'no revision is known');
  const missing = () => Promise.reject(new Error('Cannot find package'));
  await t.rejects(locate(source, 'model', {}, missing), {
    code: 'ERR_QLORA_DEPENDENCY_MISSING',
    hint: /npm install @huggingface\/hub/,
  });
  const before = process.cwd();
  t.teardown(() => process.chdir(before));
  mkdirSync(join(t.testdirName, 'models', 'tiny-llama'), { recursive: true });
  process.chdir(t.testdirName);
  for (const [path, hint] of [
    [
      source,
      /^If a folder was meant: is the path right\? A relative path starts at .* If a model of the hub: Fetch it/,
    ],
    ['models/tiny-lama', /is the path right\? Did you mean the folder 'models\/tiny-llama'\?/],
    ['models/gpt', /is the path right\? The folder 'models' has no 'gpt'\./],
  ] as const) {
    await t.rejects(locate(path, 'model', { offline: true }), { code: 'ERR_QLORA_HUB_OFFLINE', hint });
  }
  process.chdir(before);
  for (const path of ['/no/such', './no/such', '../no', 'a/b/c', 'no']) t.equal(await locate(path, 'model'), path);
  await hub.close();
  await t.rejects(load(), { code: 'ERR_QLORA_DOWNLOAD_FAILED', message: /no folder 'org/, hint: /offline: true/ });
});
