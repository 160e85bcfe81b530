export type LogLevel = 'debug' | 'info' | 'warn' | 'error';
export type Logger = (level: LogLevel, message: string, fields?: object) => void;

let current: Logger | null = null;

/** Where the library's messages go; null, the default, is nowhere: it prints nothing by itself. */
export function setLogger(log: Logger | null): void {
  current = log;
}

export function log(level: LogLevel, message: string, fields?: object): void {
  current?.(level, message, fields);
}
