/** Which modules an adapter applies to, with which r and scale: PEFT's rules of matching. */
import { createContext, Script } from 'node:vm';
import { QLoRAError } from '../errors.js';
import type { AdapterConfig } from './peft.js';

export interface AdaptedModule {
  readonly path: string;
  readonly r: number;
  readonly alpha: number;
  /** alpha / r, or alpha / sqrt(r) with rsLoRA. */
  readonly scale: number;
}

/**
 * Milliseconds that matching one pattern may take: a stranger's can need forever. A good one needs a fraction of one, but
 * on a busy machine the process may stand still for long.
 */
const patternTimeout = 3000;

/**
 * The modules among `paths` (every linear layer but the output head) that the adapter has. Targets are names that end a
 * path at a dot, or a regular expression of the whole path. r and alpha are those of the first pattern whose match ends
 * the path at a dot.
 *
 * @throws ERR_QLORA_PATTERN (no regular expression, or one that takes too long), ERR_QLORA_ADAPTER_TARGETS (none found)
 */
export function adaptedModules(config: AdapterConfig, paths: readonly string[]): AdaptedModule[] {
  const excluded = config.excludeModules ? select(config.excludeModules, paths) : new Set<string>();
  const targets = select(config.targetModules, paths);
  const ranks = firstPattern(config.rankPattern, paths);
  const alphas = firstPattern(config.alphaPattern, paths);
  const found = paths.filter((path) => targets.has(path) && !excluded.has(path) && inLayers(config, path));
  if (found.length === 0) {
    throw new QLoRAError(
      'ERR_QLORA_ADAPTER_TARGETS',
      `no module of the model is named by ${JSON.stringify(config.targetModules)}`,
      {
        hint: `The model has ${[...new Set(paths.map((p) => p.slice(p.lastIndexOf('.') + 1)))].join(', ')}.`,
      },
    );
  }
  return found.map((path) => {
    const r = ranks.get(path) ?? config.r;
    const alpha = alphas.get(path) ?? config.alpha;
    return { path, r, alpha, scale: alpha / (config.useRslora ? Math.sqrt(r) : r) };
  });
}

function select(targets: readonly string[] | string, paths: readonly string[]): Set<string> {
  if (targets === 'all-linear') return new Set(paths);
  if (typeof targets === 'string') return new Set(matching(`^(?:${targets})$`, paths));
  return new Set(paths.filter((path) => targets.some((t) => path === t || path.endsWith(`.${t}`))));
}

function firstPattern(patterns: Readonly<Record<string, number>>, paths: readonly string[]): Map<string, number> {
  const values = new Map<string, number>();
  for (const [pattern, value] of Object.entries(patterns)) {
    for (const path of matching(`^(?:.*\\.)?(?:${pattern})$`, paths)) {
      if (!values.has(path)) values.set(path, value);
    }
  }
  return values;
}

function inLayers({ layersToTransform, layersPattern }: AdapterConfig, path: string): boolean {
  if (layersToTransform.length === 0) return true;
  const parts = path.split('.');
  // As PEFT's greedy patterns: the last number that has a name before it, another before that, and something behind it.
  for (let i = parts.length - 2; i >= 2; i--) {
    const isLayer = /^\d+$/.test(parts[i] as string);
    const named = layersPattern.length === 0 || layersPattern.includes(parts[i - 1] as string);
    if (isLayer && named) return layersToTransform.includes(Number(parts[i]));
  }
  return false;
}

/** The paths that match, by a search that can be interrupted. Python's \A, \Z and (?P<name> are understood. */
function matching(pattern: string, paths: readonly string[]): string[] {
  const source = pattern.replaceAll('(?P<', '(?<').replaceAll('\\Z', '$').replaceAll('\\A', '^');
  try {
    const context = createContext(
      { source, paths: JSON.stringify(paths) },
      { codeGeneration: { strings: false, wasm: false } },
    );
    const script = new Script(
      'const p = new RegExp(source, "s"); JSON.stringify(JSON.parse(paths).filter((s) => p.test(s)))',
    );
    return JSON.parse(script.runInContext(context, { timeout: patternTimeout }) as string) as string[];
  } catch (cause) {
    const slow = (cause as NodeJS.ErrnoException).code === 'ERR_SCRIPT_EXECUTION_TIMEOUT';
    throw new QLoRAError(
      'ERR_QLORA_PATTERN',
      slow
        ? `the pattern ${pattern} takes too long to match`
        : `${pattern} is no regular expression that JavaScript knows`,
      {
        hint: 'Name the modules in a list instead.',
        cause,
      },
    );
  }
}
