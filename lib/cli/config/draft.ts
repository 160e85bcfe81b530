/** Settings of a file and of flags, under our names. */
import { parse } from 'yaml';
import { z } from 'zod';
import { didYouMean, QLoRAError } from '../../errors.js';
import { checkOptions } from '../../options.js';
import type { Setting } from './file.js';
import { llamaFactoryRules } from './llama-factory.js';
import { ourRules } from './options.js';
import { qloraRules } from './qlora.js';
import type { Rule, Rules } from './rules.js';

/** Whose words a configuration is in: keys that several have mean what they mean there. */
export type Dialect = 'qlora' | 'llama-factory';

export interface Entry {
  value: unknown;
  key: string;
  place: string;
}

/** By the path of our option, or by '@name' of a value that is put together with others. */
export type Draft = Map<string, Entry>;

/** The first table that has a key says what it is. */
const tables: Readonly<Record<Dialect, readonly Rules[]>> = {
  qlora: [ourRules, qloraRules, llamaFactoryRules],
  'llama-factory': [llamaFactoryRules, ourRules, qloraRules],
};

/** Keys whose maps hold settings: lora, quantization. */
export const nestedKeys: ReadonlySet<string> = new Set(
  Object.keys(ourRules).flatMap((key) => (key.includes('.') ? [key.slice(0, key.indexOf('.'))] : [])),
);

export function allRules(dialect: Dialect): Rules {
  return Object.assign({}, ...[...tables[dialect]].reverse());
}

/**
 * A file is LLaMA-Factory's where it has a key that only they know, and none that only we know. Flags never decide: they
 * take every program's names.
 *
 * @returns the first key that only they know with it
 */
export function dialectOf(file: readonly Setting[]): { dialect: Dialect; because?: string } {
  const onlyIn = (rules: Rules) => {
    const others = [ourRules, qloraRules, llamaFactoryRules].filter((other) => other !== rules);
    return file.find(({ key }) => Object.hasOwn(rules, key) && !others.some((other) => Object.hasOwn(other, key)))?.key;
  };
  const because = onlyIn(llamaFactoryRules);
  return because === undefined || onlyIn(ourRules) !== undefined
    ? { dialect: 'qlora' }
    : { dialect: 'llama-factory', because };
}

/** @throws ERR_QLORA_OPTION_UNKNOWN, ERR_QLORA_OPTION_UNSUPPORTED, ERR_QLORA_OPTION_INVALID, ERR_QLORA_OPTION_CONFLICT */
export function translate(settings: readonly Setting[], rules: Rules): Draft {
  const draft: Draft = new Map();
  for (const { key, value, place } of settings) {
    const rule = Object.hasOwn(rules, key) ? rules[key] : undefined;
    if (!rule) throw unknown(key, place, rules);
    if (rule.kind === 'refuses' || (rule.kind === 'agrees' && !rule.takes.safeParse(value).success)) {
      throw new QLoRAError(
        'ERR_QLORA_OPTION_UNSUPPORTED',
        `${place}: ${key}: ${JSON.stringify(value)} is not supported: ${rule.note}`,
        { hint: 'Take the key out.', detail: { option: key, place } },
      );
    }
    if (rule.kind === 'agrees') continue;
    check(rule, { key, value, place });
    const ours = rule.convert(value);
    if (ours === undefined) continue;
    const earlier = draft.get(rule.to);
    if (earlier && JSON.stringify(earlier.value) !== JSON.stringify(ours)) {
      throw conflict(
        place,
        `'${key}' and '${earlier.key}' (${earlier.place}) set the same option, to different values`,
      );
    }
    draft.set(rule.to, { value: ours, key, place });
  }
  return draft;
}

function check({ takes }: Extract<Rule, { kind: 'maps' }>, setting: Setting): void {
  const { key, value } = setting;
  try {
    checkOptions(z.strictObject({ [key]: takes }), { [key]: value }, 'configuration');
  } catch (error) {
    const { option } = (error as QLoRAError).detail ?? {};
    throw atPlace(error as QLoRAError, setting, option === key ? 'all' : 'part');
  }
}

/**
 * An error about an option, or about a part of its value, as one about the place where that was set. A flag is its
 * option's name; of a line of a file the key is said too.
 */
export function atPlace(error: QLoRAError, { key, place }: Entry, about: 'all' | 'part'): QLoRAError {
  const { code, hint, detail } = error;
  let what = error.message.replace(/^\w+: (?=option '|there is no option)/, '');
  if (about === 'all') {
    what = what.replace(`option '${detail?.option}': `, '').replace(`${detail?.option} must be `, 'must be ');
    if (!place.startsWith('--')) what = `option '${key}': ${what}`;
  }
  return new QLoRAError(code, `${place}: ${what}`, { hint, detail: { ...detail, place }, cause: error });
}

/** The text of a flag as the value that its key takes: a number and a truth value where text is not taken. */
export function valueOfFlag(rule: Rule, text: string): unknown {
  if (rule.kind === 'refuses' || rule.takes.safeParse(text).success) return text;
  try {
    return parse(text);
  } catch {
    return text;
  }
}

export function conflict(place: string, what: string): QLoRAError {
  return new QLoRAError('ERR_QLORA_OPTION_CONFLICT', `${place}: ${what}`, { hint: 'Leave one of them out.' });
}

/** The option that a wrong key names without its block, or with another program's word: rank, lora.rank, lora.lora_rank. */
export function otherName(key: string, rules: Rules): string | undefined {
  const [, block = 'lora', name = key] = /^([^.]+)\.(.+)$/.exec(key) ?? [];
  for (const other of [`${block}_${name}`, name]) {
    const rule = Object.hasOwn(rules, other) ? rules[other] : undefined;
    if (rule?.kind === 'maps' && rule.to.startsWith(`${block}.`)) return rule.to;
  }
  return undefined;
}

/** A key with a dot is inside of one of nestedKeys, where only what the block takes is near. */
function unknown(key: string, place: string, rules: Rules): QLoRAError {
  const block = key.slice(0, key.indexOf('.') + 1);
  const inside = Object.keys(rules).flatMap((known) => (known.startsWith(block) ? [known.slice(block.length)] : []));
  const nearest = didYouMean(key.slice(block.length), inside);
  const near = otherName(key, rules) ?? (nearest && block + nearest);
  const takes = block !== '' && inside.length > 0 ? `It takes ${inside.join(', ')}.` : 'docs/cli.md lists every key.';
  return new QLoRAError('ERR_QLORA_OPTION_UNKNOWN', `${place}: there is no option '${key}'`, {
    hint: near ? `Did you mean '${near}'?` : takes,
    detail: { option: key, place },
  });
}
