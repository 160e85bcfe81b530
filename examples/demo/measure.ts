import type { QuantizedModel } from '../../lib/index.js';
import type { Question } from './old-skills.js';

export interface Answer {
  question: Question;
  answer: string;
  right: boolean;
}

export interface AskOptions {
  /** null is the model without any adapter. */
  adapter: string | null;
  signal?: AbortSignal;
  onAnswer?(done: number): void;
}

/** Questions that are under way at the same time, so that the model never waits for the next one. */
const atOnce = 32;
/** Longer than any right answer. */
const maxNewTokens = 16;

/** Asks each question alone, as a user would, and takes the likeliest answer. */
export async function ask(
  model: Pick<QuantizedModel, 'generate'>,
  questions: readonly Question[],
  { adapter, signal, onAnswer }: AskOptions,
): Promise<Answer[]> {
  const answers: Answer[] = [];
  let next = 0;
  let done = 0;
  const worker = async () => {
    while (next < questions.length) {
      const index = next++;
      const question = questions[index] as Question;
      const { instruction, input } = question;
      const options = { adapter, maxNewTokens, doSample: false, ...(signal ? { signal } : {}) };
      const answer = (await model.generate({ instruction, ...(input ? { input } : {}) }, options)).trim();
      answers[index] = { question, answer, right: answer === question.output };
      onAnswer?.(++done);
    }
  };
  await Promise.all(Array.from({ length: Math.min(atOnce, questions.length) }, worker));
  return answers;
}

/** Share of right answers. */
export function accuracy(answers: readonly Answer[]): number {
  return answers.filter(({ right }) => right).length / answers.length;
}
