/** What the demo trains on, and what it asks before and after: nothing asked is ever trained on. */
import { oldSkill, oldSkillOf, oldSkillWeights, type Question } from './old-skills.js';
import { seededRandom, shuffled } from './random.js';

export type Pair = readonly [a: number, b: number];

export interface DataOptions {
  seed: number;
  /** Subtractions to ask, out of the 5050 pairs a >= b below 100. */
  heldOut: number;
  /** Questions of old skills to ask. */
  oldSkills: number;
  /** Rows to train on. */
  rows: number;
  /** Share of them that are of old skills. */
  rehearsal: number;
}

export interface DemoData {
  /** Held out: subtractions, and questions of the old skills. */
  subtractions: Question[];
  oldSkills: Question[];
  /** Subtractions, then rows of old skills: the trainer shuffles them. */
  training: Question[];
}

export function makeData({ seed, heldOut, oldSkills, rows, rehearsal }: DataOptions): DemoData {
  const random = seededRandom(seed);
  const order = shuffled(random, allPairs());
  const asked = order.slice(0, heldOut);
  const rest = order.slice(heldOut);
  const old = askedOldSkills(oldSkills, seed + 1);

  const taboo = new Set(old.map(keyOf));
  const tabooPairs = new Set(asked.map(pairKey));
  const rehearsalRows: Question[] = [];
  const wanted = Math.round(rows * rehearsal);
  while (rehearsalRows.length < wanted) {
    const row = oldSkill(random);
    // 'From 38 to 59, how far is it?' would give away what 59 minus 38 is.
    if (!taboo.has(keyOf(row)) && !tabooPairs.has(pairKey(numbersIn(row)))) rehearsalRows.push(row);
  }
  // Every pair once before any comes again.
  const subtractions: Question[] = [];
  while (subtractions.length < rows - wanted) {
    subtractions.push(
      ...shuffled(random, rest)
        .slice(0, rows - wanted - subtractions.length)
        .map(subtraction),
    );
  }
  return { subtractions: asked.map(subtraction), oldSkills: old, training: [...subtractions, ...rehearsalRows] };
}

export function subtraction([a, b]: Pair): Question {
  return { kind: 'subtract', instruction: `What is ${a} minus ${b}?`, input: '', output: String(a - b) };
}

/** The numbers that an instruction names, in order of size; two of them make a pair. */
export function numbersIn({ instruction }: Question): number[] {
  return (instruction.match(/\d+/g) ?? []).map(Number).sort((a, b) => b - a);
}

export function keyOf({ instruction, input }: Question): string {
  return `${instruction}\n${input}`;
}

function allPairs(): Pair[] {
  return Array.from({ length: 100 }, (_, a) => Array.from({ length: a + 1 }, (_, b) => [a, b] as const)).flat();
}

const pairKey = (numbers: readonly number[]) => numbers.join(' ');

/** Each kind in its proportion, no question twice. */
function askedOldSkills(count: number, seed: number): Question[] {
  const random = seededRandom(seed);
  const questions = new Map<string, Question>();
  let end = 0;
  for (const [kind, weight] of oldSkillWeights) {
    end += Math.round((count * weight) / 100);
    while (questions.size < end) {
      const question = oldSkillOf(kind, random);
      questions.set(keyOf(question), question);
    }
  }
  return [...questions.values()];
}
