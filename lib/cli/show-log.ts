/** What the library says while a command runs that has its result on standard output. */
import { setLogger } from '../logger.js';
import { type Output, writeNote } from './output.js';

/** Warnings, each once, on standard error; with --json as objects among the others. */
export function showWarnings(output: Output): void {
  const shown = new Set<string>();
  setLogger((level, message) => {
    if (level !== 'warn' || shown.has(message)) return;
    shown.add(message);
    output.object({ type: 'log', level, message });
    if (!output.json) process.stderr.write(`warning: ${message}\n`);
  });
}

/** All but what is for debugging. */
export function showLog(output: Output): void {
  setLogger((level, message) => {
    if (level !== 'debug') writeNote(output, message, level);
  });
}
