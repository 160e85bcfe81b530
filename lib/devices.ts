import { cpus, totalmem } from 'node:os';
import type { QLoRAError } from './errors.js';
import { log } from './logger.js';
import { guard, native } from './native.js';
import type { MemoryUse } from './quantized-model.js';
import type { Device } from './tensor.js';

export interface Backends {
  available: { device: Device; name: string; memoryBytes: number; features: string[] }[];
  unavailable: { kind: 'cuda'; error: QLoRAError }[];
}

/** What this machine can run on, and why not the rest. Never throws, never prints. */
export function backends(): Backends {
  const { instructionSets, inUse, chosen, threads } = native.cpu();
  const found: Backends = {
    available: [
      {
        device: 'cpu',
        name: cpus()[0]?.model.trim() ?? 'CPU',
        memoryBytes: totalmem(),
        features: [...instructionSets, `path:${inUse}`, `threads:${threads}`, `chosen:${chosen}`],
      },
    ],
    unavailable: [],
  };
  try {
    const { devices, lacks } = guard(() => native.cuda());
    for (const [i, { name, memoryBytes, capability }] of devices.entries()) {
      const features = [`capability:${capability}`, ...lacks.map((operation) => `lacks:${operation}`)];
      found.available.push({ device: `cuda:${i}`, name, memoryBytes, features });
    }
  } catch (error) {
    found.unavailable.push({ kind: 'cuda', error: error as QLoRAError });
  }
  return found;
}

/**
 * The device that an option means. 'cpu' asks for nothing, 'cuda:N' is never another, 'auto' is CUDA where a device can
 * run all operations; where there is a driver and it cannot be used, that is logged.
 *
 * @throws QLoRAError `ERR_QLORA_DEVICE` where 'cuda:N' cannot be used
 */
export function chooseDevice(wanted: Device | 'auto'): Device {
  if (wanted === 'cpu') return 'cpu';
  if (wanted !== 'auto') {
    freeBytes(wanted);
    return wanted;
  }
  if (!native.cudaDriver()) return 'cpu';
  try {
    const { lacks } = guard(() => native.cuda());
    if (lacks.length === 0) return 'cuda:0';
    log('warn', `computing on the CPU: CUDA does not have ${lacks.join(', ')} yet`);
  } catch (error) {
    const { message, hint } = error as QLoRAError;
    log('warn', `computing on the CPU: ${message}`, { hint });
  }
  return 'cpu';
}

/** What a process may still take of a device at this moment. @throws as chooseDevice */
export function freeBytes(device: Device): number {
  if (device === 'cpu') return process.availableMemory();
  return guard(() => native.cudaFreeBytes(Number(device.slice('cuda:'.length))));
}

/** Of the whole process: the CPU, and each device that was used. */
export function memory(): MemoryUse[] {
  const { liveBytes, peakBytes, byClass } = native.processMemory();
  return [
    { device: 'cpu', liveBytes, peakBytes, byClass },
    ...native.cudaMemory().map(
      ({ index, liveBytes, peakBytes, byClass }): MemoryUse => ({
        device: `cuda:${index}`,
        liveBytes,
        peakBytes,
        byClass,
      }),
    ),
  ];
}
