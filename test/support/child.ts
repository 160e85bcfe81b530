import { type SpawnOptions, spawn } from 'node:child_process';
import { fileURLToPath } from 'node:url';

export interface ChildResult {
  status: number | null;
  /** SIGKILL where it hung. */
  signal: NodeJS.Signals | null;
  stdout: string;
  stderr: string;
}

const patience = 120_000;

/** Runs a mode of engine-child.js in a process of its own; one that hangs is killed, which `signal` shows. */
export function runChild(
  mode: string,
  args: readonly (string | number)[] = [],
  { env = {}, node = [] }: { env?: NodeJS.ProcessEnv; node?: readonly string[] } = {},
): Promise<ChildResult> {
  const script = fileURLToPath(new URL('./engine-child.js', import.meta.url));
  const options: SpawnOptions = { env: { ...process.env, ...env }, stdio: ['ignore', 'pipe', 'pipe'] };
  const child = spawn(process.execPath, [...node, script, mode, ...args.map(String)], options);
  let stdout = '';
  let stderr = '';
  child.stdout?.on('data', (chunk) => {
    stdout += chunk;
  });
  child.stderr?.on('data', (chunk) => {
    stderr += chunk;
  });
  const timer = setTimeout(() => child.kill('SIGKILL'), patience);
  return new Promise((resolve) => {
    child.on('close', (status, signal) => {
      clearTimeout(timer);
      resolve({ status, signal, stdout, stderr });
    });
  });
}
