/** Chat templates that are known by name, as data. What renders them is in named-chat.ts. */

/**
 * Patterns of each kind of message. `{content}` is what it says, `{bos}` and `{eos}` are the tokenizer's, `{end}` is the
 * token that ends the assistant's turn.
 */
export interface ChatFormat {
  readonly user: string;
  /** What opens an answer, and the answer with its end. */
  readonly opening: string;
  readonly answer: string;
  /** A system message by itself, or in front of the text of the user's message behind it. */
  readonly system: { readonly message: string } | { readonly inUser: string };
  /** Where a conversation has no system message. */
  readonly defaultSystem?: string;
  /** Default: the tokenizer's EOS. A tokenizer that lacks the token has its EOS in its place. */
  readonly end?: string;
  /** Whose text loses the space around it. */
  readonly trimmed?: readonly string[];
}

export const task =
  'Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n';

const chatml: ChatFormat = {
  system: { message: '<|im_start|>system\n{content}<|im_end|>\n' },
  user: '<|im_start|>user\n{content}<|im_end|>\n',
  opening: '<|im_start|>assistant\n',
  answer: '{content}{end}\n',
  end: '<|im_end|>',
};

/** A space between the heading and the answer is the answer's: with the heading it might share a token with its first word. */
const alpaca = (opening: string, answer: string): ChatFormat => ({
  system: { message: '{content}' },
  defaultSystem: task,
  user: '### Instruction:\n{content}\n\n',
  opening,
  answer,
});

export const chatFormats = {
  alpaca: alpaca('### Response:', ' {content}{eos}\n\n'),
  'alpaca-lit-gpt': alpaca('### Response:', '{content}{eos}\n\n'),
  'alpaca-llama-factory': alpaca('### Response:\n', '{content}{eos}\n\n'),
  chatml,
  qwen: { ...chatml, defaultSystem: 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' },
  llama2: {
    system: { inUser: '<<SYS>>\n{content}\n<</SYS>>\n\n' },
    user: '{bos}[INST] {content} [/INST]',
    opening: '',
    answer: ' {content} {eos}',
    trimmed: ['user', 'assistant'],
  },
  llama3: {
    system: { message: '<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>' },
    user: '<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>',
    opening: '<|start_header_id|>assistant<|end_header_id|>\n\n',
    answer: '{content}{end}',
    end: '<|eot_id|>',
    trimmed: ['system', 'user', 'assistant'],
  },
  mistral: {
    system: { inUser: '{content}\n\n' },
    user: '[INST] {content} [/INST]',
    opening: '',
    answer: ' {content}{eos}',
    trimmed: ['assistant'],
  },
  zephyr: {
    system: { message: '<|system|>\n{content}{eos}\n' },
    user: '<|user|>\n{content}{eos}\n',
    opening: '<|assistant|>\n',
    answer: '{content}{eos}\n',
  },
  gemma: {
    system: { inUser: '{content}\n\n' },
    user: '<start_of_turn>user\n{content}<end_of_turn>\n',
    opening: '<start_of_turn>model\n',
    answer: '{content}{end}\n',
    end: '<end_of_turn>',
    trimmed: ['user', 'assistant'],
  },
  'deepseek-coder': {
    system: { message: '{content}' },
    defaultSystem:
      'You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you ' +
      'only answer questions related to computer science. For politically sensitive questions, security and privacy ' +
      'issues, and other non-computer science questions, you will refuse to answer\n',
    user: '### Instruction:\n{content}\n',
    opening: '### Response:\n',
    answer: '{content}\n{end}\n',
    end: '<|EOT|>',
  },
  vicuna: {
    system: { message: '{content} ' },
    defaultSystem:
      'A chat between a curious user and an artificial intelligence assistant. ' +
      "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    user: 'USER: {content} ',
    opening: 'ASSISTANT:',
    answer: ' {content}{eos}',
  },
  plain: { system: { message: '{content}\n' }, user: '{content}\n', opening: '', answer: '{content}{eos}\n' },
} as const satisfies Record<string, ChatFormat>;
