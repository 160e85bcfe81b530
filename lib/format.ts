/** Numbers as people read them. */

const units = ['bytes', 'kB', 'MB', 'GB', 'TB'];

/** With three digits, in units of 1000. */
export function bytes(n: number): string {
  const power = Math.min(units.length - 1, n < 1 ? 0 : Math.floor(Math.log10(n) / 3));
  const value = n / 1000 ** power;
  return `${power === 0 ? value : Number(value.toPrecision(3))} ${units[power]}`;
}

export function thousands(n: number): string {
  return Math.round(n).toLocaleString('en-US');
}
