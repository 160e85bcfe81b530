import type { z } from 'zod';
import { didYouMean, nearestValue, QLoRAError } from './errors.js';

/**
 * Checks an options object. A key that the schema does not have is an error that names the nearest one; a wrong value
 * one that names what was expected and what came.
 *
 * @param where what takes the options, for the message
 */
export function checkOptions<Schema extends z.ZodObject>(
  schema: Schema,
  options: unknown,
  where: string,
): z.infer<Schema> {
  const result = schema.safeParse(options ?? {});
  if (result.success) return result.data;
  const issue = worst(result.error.issues);
  if (issue.code === 'unrecognized_keys') {
    const name = [...issue.path, issue.keys[0]].join('.');
    const near = didYouMean(issue.keys[0] as string, knownKeys(schema, issue.path));
    throw new QLoRAError('ERR_QLORA_OPTION_UNKNOWN', `${where}: there is no option '${name}'`, {
      hint: near ? `Did you mean '${near}'?` : `It takes ${knownKeys(schema, issue.path).join(', ')}.`,
      detail: { option: name },
    });
  }
  const path = issue.path.join('.');
  const value = issue.path.reduce<unknown>((v, key) => (v as Record<PropertyKey, unknown> | undefined)?.[key], options);
  const what = path === '' ? 'its options' : `option '${path}'`;
  throw new QLoRAError('ERR_QLORA_OPTION_INVALID', `${where}: ${what}: ${expected(issue)}, got ${show(value)}`, {
    hint: hintFor(issue, value) ?? 'The docstrings of the options say what each takes.',
    detail: { option: path },
  });
}

type Issue = z.core.$ZodIssue;

/** The issue that says most: of a union those of the branch that went furthest, an unknown key before all others. */
function worst(issues: readonly Issue[]): Issue {
  const all = issues.map((issue) => {
    if (issue.code !== 'invalid_union') return issue;
    const inner = issue.errors.flat().filter((i) => i.path.length > 0 || i.code === 'unrecognized_keys');
    const furthest = inner.length > 0 ? worst(inner) : undefined;
    return furthest ? { ...furthest, path: [...issue.path, ...furthest.path] } : issue;
  });
  return (all.find((issue) => issue.code === 'unrecognized_keys') ?? all[0]) as Issue;
}

/** zod's sentence without what came, which is shown as it is. */
function expected(issue: Issue): string {
  if (issue.code === 'invalid_union') return [...new Set(issue.errors.flat().map(expected))].join(' or ');
  return issue.message.replace(/^(Invalid (input|string|option)|Too (small|big)): /, '').replace(/, received .*$/, '');
}

/** What a wrong value was probably meant to be. */
function hintFor(issue: Issue, value: unknown): string | undefined {
  if (typeof value !== 'string') return undefined;
  const issues = issue.code === 'invalid_union' ? issue.errors.flat() : [issue];
  const known = issues.flatMap((i) => (i.code === 'invalid_value' ? i.values.map(String) : []));
  const near = nearestValue(value, known);
  if (near !== undefined) return `Did you mean '${near}'?`;
  return issue.code === 'invalid_type' && issue.expected === 'array' ? `Write [${JSON.stringify(value)}].` : undefined;
}

function knownKeys(schema: z.ZodObject, path: readonly PropertyKey[]): string[] {
  let at: unknown = schema;
  for (const key of path) {
    at = unwrap((at as z.ZodObject).shape?.[key as string] ?? (at as z.ZodArray).element);
  }
  return Object.keys((at as z.ZodObject)?.shape ?? schema.shape);
}

/** The object schema inside of optional() and of a union. */
function unwrap(schema: unknown): unknown {
  const { def } = schema as { def: { innerType?: unknown; options?: unknown[] } };
  if (def.innerType) return unwrap(def.innerType);
  const object = def.options?.map(unwrap).find((o) => (o as z.ZodObject).shape);
  return object ?? schema;
}

function show(value: unknown): string {
  if (value === undefined) return 'nothing';
  return typeof value === 'object' && value !== null
    ? (JSON.stringify(value)?.slice(0, 100) ?? 'an object')
    : (JSON.stringify(value) ?? String(value));
}
