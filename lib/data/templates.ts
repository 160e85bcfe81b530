import { didYouMean, QLoRAError } from '../errors.js';

/** What an instruction row asks. */
export interface Instruction {
  instruction: string;
  input?: string;
}

/**
 * A way to write an instruction as a prompt. The prompt is `source(row) + tail`; a prompt that is too long loses
 * tokens of `source`, never of `tail`, which tells the model that the answer begins.
 */
export interface PromptTemplate {
  readonly source: (row: Instruction) => string;
  readonly tail: string;
}

const TASK =
  'Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n';
const TASK_WITH_INPUT =
  'Below is an instruction that describes a task, paired with an input that provides further context. ' +
  'Write a response that appropriately completes the request.\n\n';

const alpacaSource = ({ instruction, input }: Instruction): string =>
  input
    ? `${TASK_WITH_INPUT}### Instruction:\n${instruction}\n\n### Input:\n${input}`
    : `${TASK}### Instruction:\n${instruction}`;

/** By the names that `template` takes. "Alpaca" is three strings; QLoRA's, with a space at its end, is the default. */
const TEMPLATES: Readonly<Record<string, PromptTemplate>> = {
  alpaca: { source: alpacaSource, tail: '\n\n### Response: ' },
  'alpaca-lit-gpt': { source: alpacaSource, tail: '\n\n### Response:' },
  'alpaca-llama-factory': {
    source: ({ instruction, input }) => `${TASK}### Instruction:\n${instruction}${input ? `\n${input}` : ''}`,
    tail: '\n\n### Response:\n',
  },
};

export const DEFAULT_TEMPLATE = 'alpaca';

export function templateNames(): string[] {
  return Object.keys(TEMPLATES);
}

/** Throws ERR_QLORA_TEMPLATE_UNKNOWN, which names the nearest. */
export function promptTemplate(name: string = DEFAULT_TEMPLATE): PromptTemplate {
  const template = Object.hasOwn(TEMPLATES, name) ? TEMPLATES[name] : undefined;
  if (template) return template;
  const near = didYouMean(name, templateNames());
  throw new QLoRAError(
    'ERR_QLORA_TEMPLATE_UNKNOWN',
    `There is no template '${name}', only ${templateNames().join(', ')}`,
    {
      hint: near === undefined ? `The default is '${DEFAULT_TEMPLATE}'.` : `Did you mean '${near}'?`,
      detail: { template: name, known: templateNames() },
    },
  );
}
