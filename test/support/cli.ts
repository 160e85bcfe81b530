import { type ChildProcess, spawn } from 'node:child_process';
import { fileURLToPath } from 'node:url';

export const cliFile = fileURLToPath(new URL('../../lib/cli/main.js', import.meta.url));

export interface CliResult {
  status: number | null;
  /** SIGKILL where it hung. */
  signal: NodeJS.Signals | null;
  stdout: string;
  stderr: string;
  lines: string[];
  /** Each line as JSON: for --json. */
  objects: Record<string, unknown>[];
}

export interface CliOptions {
  stdin?: string;
  env?: NodeJS.ProcessEnv;
  cwd?: string;
  /** Called with all of standard output so far, at each piece. */
  onOutput?: (stdout: string, child: ChildProcess) => void;
}

const patience = 300_000;

/** Runs `qlora-node` in a process of its own, its output piped. */
export function cli(args: readonly string[], { stdin, env, cwd, onOutput }: CliOptions = {}): Promise<CliResult> {
  const child = spawn(process.execPath, [cliFile, ...args], {
    cwd,
    env: { ...process.env, NODE_OPTIONS: '', NO_COLOR: '', DEBUG: '', ...env },
    stdio: 'pipe',
  });
  let stdout = '';
  let stderr = '';
  child.stdout.on('data', (chunk) => {
    stdout += chunk;
    onOutput?.(stdout, child);
  });
  child.stderr.on('data', (chunk) => {
    stderr += chunk;
  });
  // One that does not read what it is given is no fault.
  child.stdin.on('error', () => {});
  child.stdin.end(stdin ?? '');
  const timer = setTimeout(() => child.kill('SIGKILL'), patience);
  return new Promise((resolve) => {
    child.on('close', (status, signal) => {
      clearTimeout(timer);
      const lines = stdout.split('\n').filter((line) => line !== '');
      const objects = () => lines.map((line) => JSON.parse(line) as Record<string, unknown>);
      resolve({
        status,
        signal,
        stdout,
        stderr,
        lines,
        get objects() {
          return objects();
        },
      });
    });
  });
}
