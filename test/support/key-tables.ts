/** The tables of docs/cli.md as the command line's data has them: `node dist/test/support/key-tables.js` prints them. */
import { argv } from 'node:process';
import { fileURLToPath } from 'node:url';
import { generationRules } from '../../lib/cli/config/generation.js';
import { optimizers } from '../../lib/cli/config/hugging-face.js';
import { llamaFactoryDefaults, llamaFactoryRules } from '../../lib/cli/config/llama-factory.js';
import { ourRules } from '../../lib/cli/config/options.js';
import { qloraRules } from '../../lib/cli/config/qlora.js';
import type { Rules } from '../../lib/cli/config/rules.js';

const code = (names: readonly string[]) => names.map((name) => `\`${name}\``).join(', ');
const row = (...cells: string[]) => `| ${cells.join(' | ')} |`.replace(/\| {2}(?=\|)/g, '| ');

function namesOf(rules: Rules, to: string): string[] {
  return Object.entries(rules).flatMap(([key, rule]) => (rule.kind === 'maps' && rule.to === to ? [key] : []));
}

/** Each of our options with its names elsewhere. */
function optionRows(): string[] {
  return Object.entries(ourRules).map(([key, rule]) => {
    const to = rule.kind === 'maps' ? rule.to : key;
    return row(code([key]), code(namesOf(qloraRules, to)), code(namesOf(llamaFactoryRules, to)), rule.note);
  });
}

/** Keys of others that are more than another name. */
function otherRows(): string[] {
  const keys = [...new Set([...Object.keys(qloraRules), ...Object.keys(llamaFactoryRules)])];
  return keys.flatMap((key) => {
    const [there, other] = [qloraRules[key], llamaFactoryRules[key]];
    const differ = there && other && there.note !== other.note;
    const line = (of: string, rules: Rules) => {
      const rule = rules[key];
      if (!rule || (rule.kind === 'maps' && rule.note === '' && !rule.to.startsWith('@'))) return [];
      const to =
        rule.kind === 'maps'
          ? rule.to.startsWith('@')
            ? 'read'
            : code([rule.to])
          : rule.kind === 'agrees'
            ? 'accepted'
            : 'refused';
      return [row(code([key]), of, to, rule.note)];
    };
    if (differ) return [...line('qlora.py', qloraRules), ...line('LLaMA-Factory', llamaFactoryRules)];
    if (there && other) return line('both', qloraRules);
    return there ? line('qlora.py', qloraRules) : line('LLaMA-Factory', llamaFactoryRules);
  });
}

export interface KeyTable {
  head: string;
  rows: string[];
}

export const keyTables: readonly KeyTable[] = [
  { head: row('ours', 'qlora.py', 'LLaMA-Factory', ''), rows: optionRows() },
  { head: row('key', 'of', 'here', ''), rows: otherRows() },
  {
    head: row('`optim`', 'ours'),
    rows: Object.entries(optimizers).map(([theirs, ours]) => row(code([theirs]), code([ours]))),
  },
  {
    head: row('left out', 'means'),
    rows: Object.entries(llamaFactoryDefaults).map(([option, value]) => row(code([option]), String(value))),
  },
  {
    head: row('of text', ''),
    rows: Object.entries(generationRules).map(([name, { note }]) => row(code([name]), note)),
  },
];

if (argv[1] === fileURLToPath(import.meta.url)) {
  for (const { head, rows } of keyTables) console.log([head, head.replace(/[^|]+/g, ' --- '), ...rows, ''].join('\n'));
}
