import { QLoRAError } from '../errors.js';

/** A call that the assistant makes, as OpenAI and Hugging Face write it; `arguments` is an object where it could be read as one. */
export interface ToolCall {
  id?: string;
  type: 'function';
  function: { name: string; arguments: unknown };
}

export interface ChatTurn {
  role: string;
  content: string;
  tool_calls?: readonly ToolCall[];
  tool_call_id?: string;
  /** Of the tool that a message of the role 'tool' comes from. */
  name?: string;
}

/** What turns a conversation into a text: a model's own template, or one that is known by name. */
export interface ChatRenderer {
  render(messages: readonly ChatTurn[], options?: RenderOptions): string;
}

export interface RenderOptions {
  /** Ends the text with what opens an assistant's turn. Default false. */
  addGenerationPrompt?: boolean;
  /** bos_token and its like, by the names that templates use. */
  tokens?: Readonly<Record<string, string>>;
  /** What strftime_now tells. Default: now. */
  now?: Date;
  /** Declarations of functions that the assistant may call. Default: none. */
  tools?: readonly unknown[];
}

/** Most characters of a template and of any text it makes, and most work it may do (see boundWork): about 2 seconds. */
const MAX_SOURCE = 2 ** 20;
const MAX_OUTPUT = 2 ** 24;
const MAX_WORK = 2_000_000;
/** As Jinja's own sandbox has it. */
const MAX_RANGE = 100_000;

/** What is used of @huggingface/jinja; its values carry their type's name. */
interface JinjaValue {
  type: string;
  value: unknown;
}
interface JinjaNode {
  type: string;
}
interface JinjaEnvironment {
  set(name: string, value: unknown): JinjaValue;
}
interface JinjaInterpreter {
  evaluate(node: JinjaNode | undefined, environment: JinjaEnvironment): JinjaValue;
  run(program: object): JinjaValue;
}
interface Jinja {
  Environment: new () => JinjaEnvironment;
  Interpreter: new (environment: JinjaEnvironment) => JinjaInterpreter;
  Template: new (source: string) => { parsed: object };
}

class TemplateRaised extends Error {}
class TemplateTooMuch extends Error {}

/**
 * A chat template of a model folder: Jinja with trim_blocks and lstrip_blocks on, and with raise_exception,
 * strftime_now and range. Templates come from strangers: they see plain data only, and their work, the size of what
 * they make and their depth are bounded (ERR_QLORA_CHAT_TEMPLATE).
 */
export class ChatTemplate implements ChatRenderer {
  readonly source: string;
  readonly #jinja: Jinja;
  #program: object | undefined;

  private constructor(source: string, jinja: Jinja) {
    this.source = source;
    this.#jinja = jinja;
  }

  /** Throws ERR_QLORA_DEPENDENCY_MISSING without @huggingface/jinja. A template that does not parse fails in `render`. */
  static async create(source: string): Promise<ChatTemplate> {
    let jinja: Jinja;
    try {
      jinja = (await import('@huggingface/jinja')) as unknown as Jinja;
    } catch (error) {
      throw new QLoRAError('ERR_QLORA_DEPENDENCY_MISSING', 'Chat templates need the package @huggingface/jinja', {
        hint: 'npm install @huggingface/jinja',
        cause: error,
      });
    }
    return new ChatTemplate(source, jinja);
  }

  /** The text of a conversation. Throws ERR_QLORA_CHAT_TEMPLATE with what the template itself raises. */
  render(messages: readonly ChatTurn[], options: RenderOptions = {}): string {
    const { addGenerationPrompt = false, tokens = {}, now = new Date(), tools } = options;
    try {
      const environment = new this.#jinja.Environment();
      const input = environment.set(
        'messages',
        messages.map(({ role, content, tool_calls, tool_call_id, name }) => ({
          role,
          content,
          ...(tool_calls && { tool_calls }),
          ...(tool_call_id !== undefined && { tool_call_id }),
          ...(name !== undefined && { name }),
        })),
      );
      environment.set('add_generation_prompt', addGenerationPrompt);
      const constants = { ...CONSTANTS, ...(tools && { tools }) };
      for (const [name, value] of Object.entries(constants)) environment.set(name, value);
      for (const [name, value] of Object.entries(tokens)) environment.set(name, value);
      environment.set('range', boundedRange);
      environment.set('strftime_now', (format: unknown) => strftime(now, String(format)));
      environment.set('raise_exception', (message: unknown) => {
        throw new TemplateRaised(String(message));
      });
      const interpreter = new this.#jinja.Interpreter(environment);
      boundWork(interpreter, input);
      return String(interpreter.run(this.#parsed()).value);
    } catch (error) {
      throw templateError(error);
    }
  }

  #parsed(): object {
    if (this.source.length > MAX_SOURCE) throw new TemplateTooMuch(`it is longer than ${MAX_SOURCE} characters`);
    this.#program ??= new this.#jinja.Template(this.source).parsed;
    return this.#program;
  }
}

/** transformers passes tools and documents as None where there are none, and templates ask `is not none`. */
const CONSTANTS = {
  true: true,
  false: false,
  none: null,
  True: true,
  False: false,
  None: null,
  tools: null,
  documents: null,
};

function templateError(error: unknown): QLoRAError {
  const message = error instanceof Error ? error.message : String(error);
  if (error instanceof TemplateRaised) {
    return new QLoRAError('ERR_QLORA_CHAT_TEMPLATE', `The chat template refuses these messages: ${message}`, {
      hint: 'The model was trained on conversations of another shape: change the order or the roles of the messages.',
      detail: { raised: message },
      cause: error,
    });
  }
  const what = error instanceof RangeError ? `it nests or grows too far (${message})` : message;
  return new QLoRAError('ERR_QLORA_CHAT_TEMPLATE', `The chat template cannot be rendered: ${what}`, {
    hint: 'Put a correct chat_template.jinja into the model folder.',
    cause: error,
  });
}

/**
 * Counts work: 1 for each node that the interpreter evaluates, 1 for 64 characters of its value, and 1 for each element
 * of a list, which a loop may walk. A value's size is that of its text were it printed: lists that hold one list twice,
 * over and over, are small to keep and endless to print.
 */
function boundWork(interpreter: JinjaInterpreter, input: JinjaValue): void {
  const evaluate = interpreter.evaluate.bind(interpreter);
  const sizes = new Map<JinjaValue, number>();
  rememberSizes(input, sizes);
  let left = MAX_WORK;
  interpreter.evaluate = (node, environment) => {
    const value = evaluate(node, environment);
    const walk = Array.isArray(value.value) ? value.value.length / (sizes.has(value) ? 8 : 1) : 0;
    left -= 1 + sizeOf(value, sizes) / 64 + walk;
    if (left < 0) throw new TemplateTooMuch(`it does not end within ${MAX_WORK} steps`);
    return value;
  };
}

/** The messages never change while a template runs, so their sizes are counted once. */
function rememberSizes(value: JinjaValue, sizes: Map<JinjaValue, number>): void {
  for (const child of childrenOf(value)) rememberSizes(child, sizes);
  if (typeof value.value === 'object') sizes.set(value, sizeOf(value, sizes));
}

function sizeOf(value: JinjaValue, sizes: ReadonlyMap<JinjaValue, number>): number {
  if (typeof value.value === 'string') return checkSize(value.value.length);
  if (typeof value.value !== 'object' || value.value === null) return 0;
  let total = 0;
  let depth = 0;
  const visit = (item: JinjaValue): void => {
    const known = typeof item.value === 'string' ? item.value.length : sizes.get(item);
    if (++depth > 100) throw new TemplateTooMuch('its lists nest deeper than 100');
    total = checkSize(total + 8 + (known ?? 0));
    if (known === undefined) for (const child of childrenOf(item)) visit(child);
    depth--;
  };
  visit(value);
  return total;
}

function checkSize(size: number): number {
  if (size > MAX_OUTPUT) throw new TemplateTooMuch(`it makes more than ${MAX_OUTPUT} characters`);
  return size;
}

function childrenOf(item: JinjaValue): Iterable<JinjaValue> {
  if (Array.isArray(item.value)) return item.value as JinjaValue[];
  return item.value instanceof Map ? (item.value as Map<string, JinjaValue>).values() : [];
}

function boundedRange(...bounds: unknown[]): number[] {
  const [first = 0, second, step = 1] = bounds.filter((bound) => typeof bound === 'number');
  const [start, stop] = second === undefined ? [0, first] : [first, second];
  if (step === 0) throw new Error('range() step must not be zero');
  const count = Math.max(0, Math.ceil((stop - start) / step));
  if (count > MAX_RANGE) throw new TemplateTooMuch(`range() of ${count} is above ${MAX_RANGE}`);
  return Array.from({ length: count }, (_, i) => start + i * step);
}

const MONTHS = [
  'January',
  'February',
  'March',
  'April',
  'May',
  'June',
  'July',
  'August',
  'September',
  'October',
  'November',
  'December',
];
const DAYS = ['Sunday', 'Monday', 'Tuesday', 'Wednesday', 'Thursday', 'Friday', 'Saturday'];

/** Python's strftime in the C locale and local time, for the codes that templates use; others stay as they are. */
function strftime(date: Date, format: string): string {
  const two = (n: number): string => String(n).padStart(2, '0');
  const month = MONTHS[date.getMonth()] as string;
  const day = DAYS[date.getDay()] as string;
  const hour12 = date.getHours() % 12 === 0 ? 12 : date.getHours() % 12;
  const codes: Record<string, string> = {
    Y: String(date.getFullYear()),
    y: two(date.getFullYear() % 100),
    m: two(date.getMonth() + 1),
    B: month,
    b: month.slice(0, 3),
    d: two(date.getDate()),
    A: day,
    a: day.slice(0, 3),
    H: two(date.getHours()),
    I: two(hour12),
    M: two(date.getMinutes()),
    S: two(date.getSeconds()),
    p: date.getHours() < 12 ? 'AM' : 'PM',
    '%': '%',
  };
  return format.replace(/%(-?)([A-Za-z%])/g, (all, bare: string, code: string) => {
    const text = codes[code];
    return text === undefined ? all : bare ? text.replace(/^0(?=.)/, '') : text;
  });
}
