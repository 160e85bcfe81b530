/**
 * Whether a path matches a pattern in which `*` stands for any characters but /, `?` for one of them, and `**` as a
 * whole name for any number of folders. Patterns come from strangers, so the work is bounded by the product of both
 * lengths.
 */
export function matchesPattern(path: string, pattern: string): boolean {
  const names = path.split('/');
  const parts = pattern.replace(/^\.\//, '').split('/').slice(0, 64);
  // reachable[i]: the parts so far match the first i names.
  let reachable = names.map(() => false);
  reachable = [true, ...reachable];
  for (const part of parts) {
    const next = reachable.map(() => false);
    reachable.forEach((here, i) => {
      if (!here) return;
      if (part === '**') next.fill(true, i);
      else if (i < names.length && matchesName(names[i] as string, part)) next[i + 1] = true;
    });
    reachable = next;
  }
  return reachable[names.length] as boolean;
}

/** The same of one name. A star that matched too little takes one character more, and no earlier star is tried again. */
function matchesName(name: string, pattern: string): boolean {
  let at = 0;
  let place = 0;
  let star = -1;
  let starAt = 0;
  while (at < name.length) {
    const wanted = pattern[place];
    if (wanted === '*') {
      star = place++;
      starAt = at;
    } else if (wanted !== undefined && (wanted === '?' || wanted === name[at])) {
      place++;
      at++;
    } else if (star >= 0) {
      place = star + 1;
      at = ++starAt;
    } else return false;
  }
  while (pattern[place] === '*') place++;
  return place === pattern.length;
}
