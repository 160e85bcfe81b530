/** Runs the peers' programs, each in a process of its own, and reads the JSON lines that they print. */
import { spawn } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';

export type Line = Readonly<Record<string, unknown>>;

const root = fileURLToPath(new URL('../..', import.meta.url));
export const peersFolder = join(root, 'bench', 'peers');
const ownBenches = fileURLToPath(new URL('./main.js', import.meta.url));

/** @throws with the last lines that the program wrote where it fails */
export async function jsonLines(command: string, args: readonly string[], cwd?: string): Promise<Line[]> {
  const child = spawn(command, args, { cwd, stdio: ['ignore', 'pipe', 'pipe'] });
  let [stdout, stderr] = ['', ''];
  child.stdout.setEncoding('utf8').on('data', (text) => {
    stdout += text;
  });
  child.stderr.setEncoding('utf8').on('data', (text) => {
    stderr = (stderr + text).slice(-4000);
  });
  const status = await new Promise((resolve, reject) => {
    child.once('error', (error) => reject(new Error(`cannot start ${command}: ${error.message}`)));
    child.once('close', (code, signal) => resolve(code ?? signal));
  });
  if (status !== 0) {
    const last = stderr.trim().split('\n').slice(-4).join('\n');
    throw new Error(`${command} ${args.slice(0, 2).join(' ')} ended with ${status}\n${last}`);
  }
  return stdout
    .split('\n')
    .filter((line) => line.startsWith('{'))
    .map((line) => JSON.parse(line) as Line);
}

/** One of our benches. */
export const own = (...args: string[]) => jsonLines(process.execPath, [ownBenches, ...args, '--json']);

/** Their packages by name with the installed version, where there is one. */
export async function pythonPackages(python: string, names: readonly string[]): Promise<Map<string, string>> {
  const script = `
import importlib.metadata, json, sys
versions = {}
for name in sys.argv[1:]:
    try: versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: pass
print(json.dumps(versions))`;
  const [versions] = await jsonLines(python, ['-c', script, ...names]);
  return new Map(Object.entries(versions as Record<string, string>));
}

/** @throws where Python or a package that the scripts import is missing, with the command that installs it */
export async function checkPython(python: string): Promise<Map<string, string>> {
  const requirements = join(peersFolder, 'requirements.txt');
  const names = readFileSync(requirements, 'utf8').match(/^[\w.-]+/gm) ?? [];
  const installed = await pythonPackages(python, names).catch((error: Error) => {
    throw new Error(`${error.message}\nName a Python 3.11 with --python PATH.`);
  });
  const missing = names.filter((name) => !installed.has(name));
  if (missing.length) {
    throw new Error(
      `${python} has no ${missing.join(', ')}. Install what the peers need (of torch the CPU build is enough):\n` +
        `  ${python} -m pip install -r ${relative('', requirements)}`,
    );
  }
  return installed;
}

/** @throws where llama.cpp's packages are missing, with the commands that install them */
export async function checkLlamaCpp(python: string): Promise<void> {
  const commands: string[] = [];
  const folder = join(peersFolder, 'llama_cpp');
  if (!existsSync(join(folder, 'node_modules', 'node-llama-cpp')))
    commands.push(`npm install --ignore-scripts --no-package-lock --prefix ${relative('', folder)}`);
  if (!(await pythonPackages(python, ['gguf'])).has('gguf')) commands.push(`${python} -m pip install gguf`);
  if (commands.length) throw new Error(`llama.cpp needs more packages. Install them:\n  ${commands.join('\n  ')}`);
}
