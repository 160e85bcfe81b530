/** Numbers as people read them. */

export function percent(share: number): string {
  const value = 100 * share;
  // A single miss in hundreds must not round to all.
  return `${value > 99 && value < 100 ? value.toFixed(1) : Math.round(value)}%`;
}

export function duration(seconds: number): string {
  if (seconds < 10) return `${seconds.toFixed(1)} seconds`;
  const whole = Math.round(seconds);
  if (whole < 100) return `${whole} seconds`;
  const minutes = Math.floor(whole / 60);
  return minutes < 60 ? `${minutes} min ${whole % 60} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** As a clock counts: 0:07, 1:02:03. */
export function clock(seconds: number): string {
  const whole = Math.round(seconds);
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (n: number) => String(n).padStart(2, '0');
  return h > 0 ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
}
