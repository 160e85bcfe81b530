/**
 * The folder of a reference as a model on the device under test, made of the library's core: QuantizedModel checks what
 * users pass with a package, and a machine that runs `test/cuda.js` may have none.
 */
import { generateIds } from '../../lib/generate/tokens.js';
import { decoderOf, hiddenStates, logitsOf, type ModelCore } from '../../lib/models/core.js';
import { disposeCore, loadCore } from '../../lib/models/load.js';
import { type LoraAdapter, loadAdapter } from '../../lib/models/lora-adapter.js';
import { linearCrossEntropy } from '../../lib/ops/linear-cross-entropy.js';
import { type QuantizeOptions, resolveQuantizeOptions } from '../../lib/quantization.js';
import { type FloatDType, Tensor } from '../../lib/tensor.js';
import { testDevice } from './testing.js';

/** Label t+1 is predicted from t. */
export const shift = (labels: readonly number[]) => Int32Array.from(labels, (_, i) => labels[i + 1] ?? -100);

/** `adapter` below is the name of one, or undefined for the base. */
export class ReferenceModel implements AsyncDisposable {
  private constructor(readonly core: ModelCore) {}

  /** @param quantization undefined: as the files have the weights */
  static async load(
    directory: string,
    computeDtype: FloatDType,
    quantization?: QuantizeOptions,
  ): Promise<ReferenceModel> {
    const core = await loadCore(directory, {
      quantization: quantization && { ...resolveQuantizeOptions(quantization), skipModules: [] },
      storage: 'as-in-file',
      computeDtype,
      device: testDevice,
    });
    return new ReferenceModel(core);
  }

  loadAdapter(name: string, directory: string): Promise<LoraAdapter> {
    return loadAdapter(this.core, name, directory);
  }

  /** [T, V] of one sequence. */
  async logits(ids: readonly number[], adapter?: string): Promise<Float32Array> {
    using hidden = this.#hidden(ids, adapter);
    using logits = logitsOf(this.core, adapter, hidden);
    return logits.read();
  }

  /** The sum over labels other than -100, not shifted yet. */
  async loss(ids: readonly number[], labels: readonly number[], adapter?: string): Promise<number> {
    const { core } = this;
    using hidden = this.#hidden(ids, adapter);
    using target = Tensor.from(core.stream, shift(labels), [labels.length]);
    using loss = linearCrossEntropy(undefined, hidden, decoderOf(core, adapter).head, target, { scale: 1 });
    return (await loss.read())[0] as number;
  }

  /** The likeliest tokens, whichever they are. */
  async greedy(prompt: readonly number[], maxNewTokens: number, adapter?: string): Promise<number[]> {
    const ids: number[] = [];
    const options = { ...likeliest, maxNewTokens, adapter };
    for await (const id of generateIds(this.core, prompt, options)) ids.push(id);
    return ids;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return disposeCore(this.core);
  }

  #hidden(ids: readonly number[], adapter: string | undefined): Tensor {
    const rows = { tokens: Int32Array.from(ids), batch: 1, length: ids.length };
    return hiddenStates(this.core, undefined, rows, { adapter, checkpointing: 'none' });
  }
}

const likeliest = {
  minNewTokens: undefined,
  minLength: 0,
  temperature: 0,
  topK: 0,
  topP: 1,
  typicalP: 1,
  repetitionPenalty: 1,
  noRepeatNgramSize: 0,
  endTokens: new Set<number>(),
  numBeams: 1,
  lengthPenalty: 1,
  earlyStopping: false,
  seed: 0,
} as const;
