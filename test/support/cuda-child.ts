/** Prints as JSON what the library says of CUDA in this process: of each device named, what it is or why it is not. */

import { backends, chooseDevice } from '../../lib/devices.js';
import type { QLoRAError } from '../../lib/errors.js';

import { setLogger } from '../../lib/logger.js';
import type { Device } from '../../lib/tensor.js';

const warnings: string[] = [];
setLogger((level, message) => warnings.push(`${level}: ${message}`));
const chosen = process.argv.slice(2).map((name) => {
  try {
    return chooseDevice(name as Device | 'auto');
  } catch (error) {
    const { code, message, hint } = error as QLoRAError;
    return { code, message, hint };
  }
});
const { available, unavailable } = process.argv.includes('cpu') ? { available: [], unavailable: [] } : backends();
const reasons = unavailable.map(({ device, error: { code, message, hint } }) => ({ device, code, message, hint }));
process.stdout.write(JSON.stringify({ chosen, warnings, available, reasons }));
