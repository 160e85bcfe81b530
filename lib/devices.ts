import { cpus, totalmem } from 'node:os';
import { QLoRAError } from './errors.js';
import { native } from './native.js';
import type { MemoryUse } from './quantized-model.js';
import type { Device } from './tensor.js';

export interface Backends {
  available: { device: Device; name: string; memoryBytes: number; features: string[] }[];
  unavailable: { kind: 'cuda'; error: QLoRAError }[];
}

/** What this machine can run on, and why not the rest. Never throws, never prints. */
export function backends(): Backends {
  const { instructionSets, inUse, chosen, threads } = native.cpu();
  return {
    available: [
      {
        device: 'cpu',
        name: cpus()[0]?.model.trim() ?? 'CPU',
        memoryBytes: totalmem(),
        features: [...instructionSets, `path:${inUse}`, `threads:${threads}`, `chosen:${chosen}`],
      },
    ],
    unavailable: [
      {
        kind: 'cuda',
        error: new QLoRAError('ERR_QLORA_DEVICE', 'this version has no CUDA backend', {
          hint: "Use device: 'cpu' or 'auto'.",
        }),
      },
    ],
  };
}

/** Of the whole process. */
export function memory(): MemoryUse[] {
  const { liveBytes, peakBytes, byClass } = native.processMemory();
  return [{ device: 'cpu', liveBytes, peakBytes, byClass }];
}
