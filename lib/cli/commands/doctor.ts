import { createRequire } from 'node:module';
import { arch, availableParallelism, freemem, homedir, platform, release, totalmem } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { Command } from 'commander';
import { bytes } from '../../format.js';
import { addOutputFlags, makeOutput } from '../output.js';

export function define(command: Command): void {
  addOutputFlags(command);
  command.action(async (flags: { json?: boolean; color?: boolean }) => {
    const output = makeOutput(flags);
    const machine = machineFacts();
    // Loading the addon may fail: what is known without it is said before.
    for (const [name, value] of Object.entries(machine)) output.line(`${name.padEnd(width)}${value}`);
    const { backends } = await import('../../devices.js');
    const { available, unavailable } = backends();
    for (const { device, name, memoryBytes, features } of available) {
      output.line(`${device.padEnd(width)}${name}, ${bytes(memoryBytes)}`);
      output.line(`${''.padEnd(width)}${features.join(' ')}`);
    }
    for (const { kind, error } of unavailable) {
      output.line(`${kind.padEnd(width)}not available: ${error.message}`);
      if (error.hint) output.line(`${''.padEnd(width)}${error.hint}`);
    }
    output.object({
      type: 'doctor',
      ...machine,
      available,
      unavailable: unavailable.map(({ kind, device, error: { code, message, hint } }) => ({
        kind,
        device,
        code,
        message,
        hint,
      })),
    });
  });
}

const width = 20;

function machineFacts(): Record<string, string> {
  const { env, version } = process;
  return {
    node: version,
    system: `${platform()} ${arch()} ${release()}`,
    cores: String(availableParallelism()),
    memory: `${bytes(totalmem())}, ${bytes(freemem())} free`,
    addon: addonFile(),
    huggingFace: env.HF_HUB_CACHE ?? join(env.HF_HOME ?? join(homedir(), '.cache', 'huggingface'), 'hub'),
    QLORA_CPU: env.QLORA_CPU ?? 'not set',
    QLORA_NUM_THREADS: env.QLORA_NUM_THREADS ?? 'not set',
  };
}

/** The file that would be loaded, or why there is none. */
function addonFile(): string {
  const root = fileURLToPath(new URL('../../../../', import.meta.url));
  const { path } = createRequire(import.meta.url)('node-gyp-build') as { path: (root: string) => string };
  try {
    return path(root);
  } catch (error) {
    return (error as Error).message.split('\n')[0] as string;
  }
}
