/** Numbers as people read them. */

export function percent(share: number): string {
  const value = 100 * share;
  // A single miss in hundreds must not round to all.
  return `${value > 99 && value < 100 ? value.toFixed(1) : Math.round(value)}%`;
}

export function bytes(n: number): string {
  const units = ['bytes', 'kB', 'MB', 'GB'];
  const power = Math.min(units.length - 1, n < 1 ? 0 : Math.floor(Math.log10(n) / 3));
  const value = n / 1000 ** power;
  return `${value < 10 && power > 0 ? value.toFixed(1) : Math.round(value)} ${units[power]}`;
}

export function duration(seconds: number): string {
  if (seconds < 10) return `${seconds.toFixed(1)} seconds`;
  const whole = Math.round(seconds);
  return whole < 100 ? `${whole} seconds` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

export function thousands(n: number): string {
  return Math.round(n).toLocaleString('en-US');
}
