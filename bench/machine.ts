/** Where a bench runs, and what its process has taken. */
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { performance } from 'node:perf_hooks';
import { backends } from '../lib/index.js';

export type MachineFields = {
  cpu: string;
  /** Instruction sets that matter here, as the processor names them. */
  cpuFlags: string[];
  /** Of the pool that computes: as many as QLORA_NUM_THREADS says, else one a core. */
  threads: number;
  /** The kernels in use. */
  path: string;
};

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

const settings = /^QLORA_(NUM_THREADS|CPU|CACHE|CUDA\w*|NODE_PREBUILD)$/;

/** Variables that look like settings and are none: what is measured with them is not what was meant. */
export function unreadSettings(): string[] {
  return Object.keys(process.env).filter((name) => name.startsWith('QLORA_') && !settings.test(name));
}

/** Of the largest cache of the first core; 32 MiB where the system does not tell. */
export function cacheBytes(): number {
  const folder = '/sys/devices/system/cpu/cpu0/cache';
  const unit: Record<string, number> = { K: 2 ** 10, M: 2 ** 20, G: 2 ** 30 };
  try {
    const sizes = readdirSync(folder)
      .filter((name) => name.startsWith('index'))
      .map((name) => /^(\d+)([KMG])/.exec(readFileSync(`${folder}/${name}/size`, 'utf8')))
      .map((match) => Number(match?.[1] ?? 0) * (unit[match?.[2] ?? ''] ?? 0));
    return Math.max(...sizes, 2 ** 20);
  } catch {
    return 2 ** 25;
  }
}

/** Peak resident bytes since the process started or `resetPeakRss()`. */
export function peakRssBytes(): number {
  try {
    const kib = readFileSync('/proc/self/status', 'utf8').match(/^VmHWM:\s+(\d+) kB$/m)?.[1];
    if (kib !== undefined) return Number(kib) * 1024;
  } catch {}
  return process.resourceUsage().maxRSS * 1024;
}

/** The peak starts anew, where the system lets a process do that. */
export function resetPeakRss(): void {
  try {
    writeFileSync('/proc/self/clear_refs', '5');
  } catch {}
}

/** Processor time of the main thread so far; where the system does not tell, the time in which it was not idle. */
export function mainThreadSeconds(): number {
  try {
    const [nanoseconds] = readFileSync(`/proc/self/task/${process.pid}/schedstat`, 'utf8').split(' ');
    return Number(nanoseconds) / 1e9;
  } catch {
    return performance.eventLoopUtilization().active / 1000;
  }
}
