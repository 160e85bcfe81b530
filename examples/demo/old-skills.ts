/** What the bundled model was trained on before it came here: the kinds of rows of model/make.py, in its proportions. */
import { below, choose, type Random } from './random.js';

export interface Question {
  kind: string;
  instruction: string;
  /** Empty where the instruction says it all. */
  input: string;
  /** The right answer. */
  output: string;
}

const colors = Object.entries({
  'a lemon': 'yellow',
  'the sky': 'blue',
  grass: 'green',
  snow: 'white',
  coal: 'black',
  'a tomato': 'red',
  'a carrot': 'orange',
  'a plum': 'purple',
  chocolate: 'brown',
  'a flamingo': 'pink',
  'a cloud': 'white',
  'a banana': 'yellow',
  'the sea': 'blue',
  'a leaf': 'green',
  'a crow': 'black',
  'a cherry': 'red',
});
const opposites = [
  'hot cold',
  'big small',
  'up down',
  'day night',
  'open closed',
  'fast slow',
  'high low',
  'old new',
  'happy sad',
  'light dark',
  'early late',
  'wet dry',
  'full empty',
  'strong weak',
  'first last',
  'loud quiet',
];
const words = (
  'apple river stone cloud table paper green house light water mountain garden window letter bridge forest ' +
  'candle silver market winter summer doctor engine planet rocket guitar pencil bottle ticket island'
).split(' ');

/** One-digit numbers come more often than chance has them. */
const number = (random: Random) => (random() < 0.15 ? below(random, 10) : below(random, 100));
const from1 = (random: Random, last: number) => 1 + below(random, last);

interface Kind {
  /** Of 100 rows so many are of this kind. */
  weight: number;
  make(random: Random): { instruction: string; input?: string; output: string | number };
}

const kinds: Readonly<Record<string, Kind>> = {
  add: {
    weight: 26,
    make(random) {
      const [a, b] = [number(random), number(random)];
      const forms = [
        `What is ${a} plus ${b}?`,
        `Add ${a} and ${b}.`,
        `Compute ${a} + ${b}.`,
        `How much is ${a} plus ${b}?`,
      ];
      return { instruction: choose(random, forms), output: a + b };
    },
  },
  'missing addend': {
    weight: 30,
    make(random) {
      const [a, b] = [number(random), number(random)].sort((x, y) => x - y) as [number, number];
      const forms = [
        `What must be added to ${a} to get ${b}?`,
        `${b} is ${a} plus what?`,
        `From ${a} to ${b}, how far is it?`,
      ];
      return { instruction: choose(random, forms), output: b - a };
    },
  },
  compare: {
    weight: 8,
    make(random) {
      const [a, b] = [number(random), number(random)];
      const [adjective, output] = choose(random, [
        ['larger', Math.max(a, b)] as const,
        ['smaller', Math.min(a, b)] as const,
      ]);
      return { instruction: `Which number is ${adjective}, ${a} or ${b}?`, output };
    },
  },
  'count up': {
    weight: 6,
    make(random) {
      const [a, k] = [number(random), from1(random, 9)];
      return { instruction: `Count up ${k} from ${a}.`, output: a + k };
    },
  },
  'count down': {
    weight: 8,
    make(random) {
      const [a, k] = [number(random), from1(random, 9)];
      return { instruction: `Count down ${k} from ${a + k}.`, output: a };
    },
  },
  sort: {
    weight: 5,
    make(random) {
      const numbers = [number(random), number(random), number(random)];
      const output = numbers.toSorted((a, b) => a - b).join(' ');
      return { instruction: 'Sort the numbers.', input: numbers.join(' '), output };
    },
  },
  color: {
    weight: 2,
    make(random) {
      const [thing, output] = choose(random, colors);
      return { instruction: `What color is ${thing}?`, output };
    },
  },
  opposite: {
    weight: 2,
    make(random) {
      const pair = choose(random, opposites).split(' ');
      const [word, output] = (random() < 0.5 ? pair : pair.reverse()) as [string, string];
      return { instruction: `What is the opposite of ${word}?`, output };
    },
  },
  'spell backwards': {
    weight: 4,
    make(random) {
      const word = choose(random, words);
      return { instruction: 'Spell the word backwards.', input: word, output: [...word].reverse().join('') };
    },
  },
  capitals: {
    weight: 2,
    make(random) {
      const word = choose(random, words);
      return { instruction: 'Write the word in capital letters.', input: word, output: word.toUpperCase() };
    },
  },
  'count letters': {
    weight: 2,
    make(random) {
      const word = choose(random, words);
      return { instruction: 'How many letters does the word have?', input: word, output: word.length };
    },
  },
  repeat: {
    weight: 3,
    make(random) {
      const [word, times] = [choose(random, words), 1 + from1(random, 3)];
      return { instruction: `Repeat the word ${times} times.`, input: word, output: Array(times).fill(word).join(' ') };
    },
  },
  digits: {
    weight: 2,
    make(random) {
      const digits = String(100 + below(random, 900));
      return { instruction: `Write the digits of ${digits} one by one.`, output: [...digits].join(' ') };
    },
  },
};

/** The kinds and of 100 rows how many each has. */
export const oldSkillWeights: ReadonlyMap<string, number> = new Map(
  Object.entries(kinds).map(([kind, { weight }]) => [kind, weight]),
);

/** A row of the given kind. */
export function oldSkillOf(kind: string, random: Random): Question {
  const { instruction, input = '', output } = (kinds[kind] as Kind).make(random);
  return { kind, instruction, input, output: String(output) };
}

/** A row of any kind. */
export function oldSkill(random: Random): Question {
  let left = below(random, 100);
  for (const [kind, weight] of oldSkillWeights) {
    left -= weight;
    if (left < 0) return oldSkillOf(kind, random);
  }
  throw new Error('the weights of all kinds must sum to 100');
}
