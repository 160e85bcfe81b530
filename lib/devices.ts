import { cpus, totalmem } from 'node:os';
import { QLoRAError } from './errors.js';
import { log } from './logger.js';
import { guard, native, wrapError } from './native.js';
import type { MemoryUse } from './quantized-model.js';
import type { Device } from './tensor.js';

export interface Backends {
  available: { device: Device; name: string; memoryBytes: number; features: string[] }[];
  /** `device`: the one that cannot be used; left out where it is CUDA as a whole. */
  unavailable: { kind: 'cuda'; device?: Device; error: QLoRAError }[];
}

/**
 * What this machine can run on, and why not the rest. Prints nothing.
 *
 * @throws QLoRAError `ERR_QLORA_CPU` where QLORA_CPU or QLORA_NUM_THREADS asks for what does not exist; never else
 */
export function backends(): Backends {
  const { instructionSets, inUse, chosen, threads } = guard(() => native.cpu());
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
    for (const [i, device] of devices.entries()) {
      if (device.error) {
        found.unavailable.push({ kind: 'cuda', device: `cuda:${i}`, error: wrapError(device.error) as QLoRAError });
        continue;
      }
      const { name, memoryBytes, capability } = device;
      const features = [`capability:${capability}`, ...lacks.map((operation) => `lacks:${operation}`)];
      found.available.push({ device: `cuda:${i}`, name, memoryBytes, features });
    }
  } catch (error) {
    found.unavailable.push({ kind: 'cuda', error: error as QLoRAError });
  }
  return found;
}

/**
 * The device that an option means. 'cpu' asks for nothing, 'cuda:N' is never another, 'auto' is the first CUDA device
 * that can be used, where it can run all operations. Where there is a driver and none can, that is logged.
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
    return firstCudaDevice();
  } catch (error) {
    warnOnce(error as QLoRAError);
    return 'cpu';
  }
}

/** @throws QLoRAError what is wrong with the first where none can be used */
function firstCudaDevice(): Device {
  const { devices, lacks } = guard(() => native.cuda());
  if (lacks.length > 0) throw new QLoRAError('ERR_QLORA_DEVICE', `CUDA does not have ${lacks.join(', ')} yet`);
  const errors: unknown[] = [];
  for (const i of devices.keys()) {
    try {
      freeBytes(`cuda:${i}`);
      return `cuda:${i}`;
    } catch (error) {
      errors.push(error);
    }
  }
  throw errors[0];
}

const warned = new Set<string>();

/** A training asks several times. */
function warnOnce({ message, hint }: QLoRAError): void {
  if (warned.has(message)) return;
  warned.add(message);
  log('warn', `computing on the CPU: ${message}`, { hint });
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
