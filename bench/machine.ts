/** What every bench says about where it ran. */
import { readFileSync } from 'node:fs';
import { backends } from '../lib/index.js';

export interface MachineFields {
  cpu: string;
  /** Instruction sets that matter here, as the processor names them. */
  cpuFlags: string[];
  threads: number;
  /** The kernels in use. */
  path: string;
}

const interesting = [
  'avx2',
  'fma',
  'avx512f',
  'avx512bw',
  'avx512_vnni',
  'avx512_bf16',
  'avx512_fp16',
  'amx_tile',
  'amx_bf16',
];

export function machineFields(): MachineFields {
  const [cpu] = backends().available;
  const feature = (name: string) => cpu?.features.find((f) => f.startsWith(`${name}:`))?.slice(name.length + 1) ?? '';
  return {
    cpu: cpu?.name ?? '',
    cpuFlags: processorFlags(),
    threads: Number(feature('threads')),
    path: feature('path'),
  };
}

function processorFlags(): string[] {
  try {
    const line = readFileSync('/proc/cpuinfo', 'utf8').match(/^(?:flags|Features)\s*:(.*)$/m)?.[1] ?? '';
    const flags = new Set(line.split(' '));
    return interesting.filter((flag) => flags.has(flag));
  } catch {
    return [];
  }
}

/** Peak resident bytes since the process started or `resetPeak()`; undefined where the system does not tell. */
export function peakRssBytes(): number | undefined {
  try {
    const kib = readFileSync('/proc/self/status', 'utf8').match(/^VmHWM:\s+(\d+) kB$/m)?.[1];
    return kib === undefined ? undefined : Number(kib) * 1024;
  } catch {
    return undefined;
  }
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2
    ? (sorted[middle] as number)
    : ((sorted[middle - 1] as number) + (sorted[middle] as number)) / 2;
}
