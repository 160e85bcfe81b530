/** A talk with a model: what was said, who speaks, and the commands that begin with a slash. */
import { basename } from 'node:path';
import { didYouMean, QLoRAError } from '../errors.js';
import type { GenerateOptions } from '../generate/options.js';
import type { ChatMessage, QuantizedModel } from '../quantized-model.js';
import { loadAdapter } from './load-model.js';
import { type Output, writeError } from './output.js';

export class Conversation {
  readonly #model: QuantizedModel;
  readonly #options: GenerateOptions;
  readonly #output: Output;
  #system: string | undefined;
  #history: ChatMessage[] = [];
  /** null is the base. */
  #adapter: string | null = null;
  #abort: AbortController | undefined;

  constructor(model: QuantizedModel, options: GenerateOptions, system: string | undefined, output: Output) {
    this.#model = model;
    this.#options = options;
    this.#system = system;
    this.#output = output;
  }

  /** 'name=folder', or a folder, whose last part is the name. It speaks from now on. */
  async load(adapter: string): Promise<void> {
    const at = adapter.indexOf('=');
    const folder = adapter.slice(at + 1);
    const name = at < 0 ? basename(folder) : adapter.slice(0, at);
    await loadAdapter(this.#model, name, folder);
    this.#adapter = name;
  }

  /** Ends the answer that is coming. @returns whether one was */
  cut(): boolean {
    this.#abort?.abort();
    return this.#abort !== undefined;
  }

  /** A line of the user's. What goes wrong is said, and the talk goes on. @returns whether it is the end */
  async take(line: string): Promise<boolean> {
    if (line === '') return false;
    const [word = '', ...rest] = line.split(/\s+/);
    if (word === '/exit' || word === '/quit') return true;
    try {
      if (word.startsWith('/')) await this.#command(word.slice(1), rest, line.slice(word.length).trim());
      else await this.#answer(line);
    } catch (error) {
      writeError(error, this.#output.json);
    }
    return false;
  }

  async #command(name: string, words: readonly string[], text: string): Promise<void> {
    const commands: Record<string, () => Promise<void> | void> = {
      adapter: () => this.#choose(words[0]),
      load: async () => {
        const [adapter, folder] = words;
        if (!adapter || !folder) throw wrong('/load takes a name and a folder');
        await this.load(`${adapter}=${folder}`);
        this.#say(`${adapter} speaks`);
      },
      system: () => {
        this.#system = text === '' ? undefined : text;
        this.#forget();
      },
      reset: () => this.#forget(),
      help: () => this.#say('/adapter NAME|off, /load NAME FOLDER, /system TEXT, /reset, /exit'),
    };
    const command = Object.hasOwn(commands, name) ? commands[name] : undefined;
    if (!command) {
      const near = didYouMean(name, Object.keys(commands));
      throw wrong(`there is no /${name}`, near ? `Did you mean '/${near}'?` : '/help lists what there is.');
    }
    await command();
  }

  #choose(name: string | undefined): void {
    const known = [...this.#model.adapters.keys()];
    if (name === undefined) {
      this.#say(`loaded: ${known.join(', ') || 'none'}; ${this.#adapter ?? 'the base'} speaks`);
      return;
    }
    if (name !== 'off' && !known.includes(name)) {
      throw wrong(
        `no adapter '${name}' is loaded`,
        `Loaded: ${known.join(', ') || 'none'}; /load NAME FOLDER loads one.`,
      );
    }
    this.#adapter = name === 'off' ? null : name;
    this.#say(`${this.#adapter ?? 'the base'} speaks`);
  }

  #forget(): void {
    this.#history = [];
    this.#say('a new beginning');
  }

  async #answer(content: string): Promise<void> {
    const system: ChatMessage[] = this.#system === undefined ? [] : [{ role: 'system', content: this.#system }];
    const question: ChatMessage = { role: 'user', content };
    const abort = new AbortController();
    this.#abort = abort;
    let text = '';
    try {
      const stream = this.#model.generate([...system, ...this.#history, question], {
        ...this.#options,
        adapter: this.#adapter,
        signal: abort.signal,
      });
      for await (const piece of stream) {
        text += piece;
        this.#output.write(piece);
        this.#output.object({ type: 'text', text: piece });
      }
    } catch (error) {
      if (!abort.signal.aborted) throw error;
    } finally {
      this.#abort = undefined;
      this.#output.line();
    }
    this.#output.object({ type: 'answer', text, adapter: this.#adapter });
    this.#history.push(question, { role: 'assistant', content: text });
  }

  #say(message: string): void {
    this.#output.line(`(${message})`);
    this.#output.object({ type: 'info', message });
  }
}

function wrong(message: string, hint = '/help lists what there is.'): QLoRAError {
  return new QLoRAError('ERR_QLORA_ARGUMENT', message, { hint });
}
