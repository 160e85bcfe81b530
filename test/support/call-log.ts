import { readFileSync, truncateSync } from 'node:fs';

/** What fail_io.cpp wrote down, a line a call, since it was last asked for. */
export function callsSince(log: string): string[] {
  const lines = readFileSync(log, 'utf8').trim().split('\n');
  truncateSync(log);
  return lines;
}

/** The call that was disturbed, with its file; empty where none was. */
export function disturbed(log: string): string {
  return (
    callsSince(log)
      .find((line) => line.startsWith('disturbed '))
      ?.slice('disturbed '.length) ?? ''
  );
}
