/** Every key of a configuration as a flag: as it is written, and with hyphens. */
import { type Command, Option } from 'commander';
import { valueOfFlag } from './config/draft.js';
import type { Setting } from './config/file.js';
import type { Rule, Rules } from './config/rules.js';

/**
 * @param rules the keys that the command takes; those of `shown` stand in its help, the rest are other names
 * @returns what was given, once the command line is parsed
 */
export function addSettingFlags(command: Command, rules: Rules, shown: Rules): () => Setting[] {
  const given = new Map<string, Setting>();
  const taken = new Set(command.options.flatMap(({ long }) => (long ? [long] : [])));
  const add = (flag: string, key: string, rule: Rule, hidden: boolean) => {
    if (taken.has(flag)) return;
    taken.add(flag);
    const take = (text: string) => {
      given.delete(key);
      given.set(key, { key, value: valueOfFlag(rule, text), place: flag });
      return text;
    };
    const isBoolean = rule.kind !== 'refuses' && rule.takes.safeParse(true).success;
    const note = rule.note;
    const option = new Option(`${flag} ${isBoolean ? '[value]' : '<value>'}`, note).argParser(take);
    if (isBoolean) option.preset('true');
    command.addOption(option.hideHelp(hidden));
    if (isBoolean) {
      const negated = new Option(flag.replace('--', '--no-'), '').argParser(take).preset('false');
      command.addOption(negated.hideHelp());
    }
  };
  for (const [key, rule] of Object.entries(shown)) add(`--${hyphenated(key)}`, key, rule, false);
  for (const [key, rule] of Object.entries(rules)) {
    add(`--${key}`, key, rule, true);
    add(`--${hyphenated(key)}`, key, rule, true);
  }
  return () => [...given.values()];
}

/** lora.targetModules and target_modules with hyphens. */
export function hyphenated(key: string): string {
  return key
    .replace(/[._]/g, '-')
    .replace(/[A-Z]+/g, (letters, at) => `${at === 0 ? '' : '-'}${letters.toLowerCase()}`)
    .replace(/--+/g, '-');
}

/** The rules that set one of these options, or a part of one. */
export function rulesFor(rules: Rules, options: readonly string[]): Rules {
  const ofThem = ([, rule]: [string, Rule]) =>
    rule.kind === 'maps' && options.some((option) => rule.to === option || rule.to.startsWith(`${option}.`));
  return Object.fromEntries(Object.entries(rules).filter(ofThem));
}
