import { QLoRAError } from '../errors.js';
import { PageFile, pagedBytes } from '../io/page-file.js';
import { type SafetensorsItem, writeSafetensors } from '../io/safetensors.js';
import { fill, zeros } from '../ops/elementwise.js';
import { gradNorm } from '../ops/grad-norm.js';
import { finishStep, type OptimizerOp, optimizerStep } from '../ops/optimizer.js';
import { type FloatDType, Tensor } from '../tensor.js';
import { openState } from './optimizer-file.js';
import { keptState, optimizerKinds, type StatePart, stateBytes } from './optimizer-kinds.js';
import type { ResolvedTrainerOptions } from './options.js';

/** f16's loss: its scale at the start, and the good steps after which it doubles, as PyTorch's GradScaler has them. */
const initialLossScale = 2 ** 16;
const growthInterval = 2000;

/** Where state goes that may not stay in memory. */
export interface Paging {
  /** Bytes of state that stay in memory. The slots, pageSlots of slotBytes each, come on top. */
  residentBytes: number;
  /** A file without a name is made there. */
  directory: string;
  /** Default 16 MiB. */
  slotBytes?: number;
}

export const defaultSlotBytes = 16 * 2 ** 20;

export interface OptimizerSetting {
  /** T of AdEMAMix's schedules. */
  totalSteps: number;
  /** f16 scales its loss. */
  computeDtype: FloatDType;
  /** Default: all state stays in memory. Only kinds that page take it. */
  paging?: Paging;
}

/** Parameters that one call updates: those whose rate, kind of state and place of state are the same. */
interface Group {
  op: OptimizerOp;
  /** Times the learning rate. */
  rate: number;
  params: Tensor[];
  gradients: Tensor[];
  /** For each part of the state a list parallel to params. */
  state: Tensor[][];
}

/** B of a LoRA adapter, by its name in PEFT's files. */
const isLoraB = /\.lora_B\.weight$/;

/** The parameters that are trained, their gradients and the optimizer's state, all on the stream. */
export class Optimizer {
  /** What micro-steps multiply their gradients by, f32 [1]; undefined where they do not. */
  readonly lossScale: Tensor | undefined;
  readonly #parameters: ReadonlyMap<string, Tensor>;
  readonly #gradients: Tensor[];
  readonly #options: ResolvedTrainerOptions;
  readonly #totalSteps: number;
  readonly #groups = new Map<string, Group>();
  /** All state by its name in a file. */
  readonly #state = new Map<string, Tensor>();
  /** i32 [2] and f32 [1]: finishStep's. */
  readonly #counters: Tensor;
  readonly #scale: Tensor;

  private constructor(
    parameters: ReadonlyMap<string, Tensor>,
    options: ResolvedTrainerOptions,
    { totalSteps, computeDtype }: OptimizerSetting,
  ) {
    const [first] = parameters.values();
    const { stream } = first as Tensor;
    this.#parameters = parameters;
    this.#options = options;
    this.#totalSteps = totalSteps;
    this.#counters = zeros(stream, [2], 'i32', 'optimizer');
    this.#scale = new Tensor(stream, 'f32', [1], 'optimizer');
    fill(this.#scale, computeDtype === 'f16' ? initialLossScale : 1);
    this.lossScale = computeDtype === 'f16' ? this.#scale : undefined;
    this.#gradients = [...parameters.values()].map((p) => zeros(stream, p.shape, 'f32', 'optimizer'));
    [...parameters.values()].forEach((p, i) => {
      p.requiresGrad = true;
      p.gradient = this.#gradients[i];
    });
  }

  /**
   * @param parameters what is trained, f32, by name
   * @throws ERR_QLORA_DISK_FULL, ERR_QLORA_WRITE_FAILED where there is no place for paged state
   */
  static async create(
    parameters: ReadonlyMap<string, Tensor>,
    options: ResolvedTrainerOptions,
    setting: OptimizerSetting,
  ): Promise<Optimizer> {
    const { paging } = setting;
    const paged = paging ? pagedNames(parameters, options, paging.residentBytes) : new Set<string>();
    const optimizer = new Optimizer(parameters, options, setting);
    try {
      if (!paging || paged.size === 0) {
        optimizer.#makeState(paged);
        return optimizer;
      }
      const bytes = [...paged].flatMap((name) =>
        keptState(options, (parameters.get(name) as Tensor).shape).parts.map((part) => part.bytes),
      );
      const { directory, slotBytes = defaultSlotBytes } = paging;
      const [first] = parameters.values();
      using file = await PageFile.create((first as Tensor).stream, directory, pagedBytes(bytes), slotBytes);
      optimizer.#makeState(paged, file);
      return optimizer;
    } catch (error) {
      optimizer.dispose();
      throw error;
    }
  }

  #makeState(paged: ReadonlySet<string>, file?: PageFile): void {
    const { loraPlusRatio } = this.#options;
    for (const [name, p] of this.#parameters) {
      const { op, parts } = keptState(this.#options, p.shape);
      const rate = isLoraB.test(name) ? loraPlusRatio : 1;
      const key = `${op} ${rate} ${paged.has(name)}`;
      const group = this.#groups.get(key) ?? { op, rate, params: [], gradients: [], state: parts.map(() => []) };
      this.#groups.set(key, group);
      group.params.push(p);
      group.gradients.push(p.gradient as Tensor);
      parts.forEach((part: StatePart, i) => {
        const { dtype, shape } = part;
        const tensor = file && paged.has(name) ? file.tensor(dtype, shape) : zeros(p.stream, shape, dtype, 'optimizer');
        group.state[i]?.push(tensor);
        this.#state.set(`${name}.${part.name}`, tensor);
      });
    }
  }

  /** Forgets what was accumulated. */
  zeroGradients(): void {
    for (const gradient of this.#gradients) fill(gradient, 0);
  }

  /**
   * One step from the accumulated gradients, unscaled and clipped to maxGradNorm. Nothing changes where their norm is not
   * finite, or one of `checks`: all of that is decided on the stream.
   *
   * @param checks f32 [1] each, 0 where all is well
   * @returns f32 [3], to be disposed of: the norm before clipping, 1 where the step was applied, and the loss scale that
   *   the gradients had; a step that was not applied has halved it, unless it is 1
   */
  step(learningRate: number, checks: readonly Tensor[] = []): Tensor {
    const { weightDecay, maxGradNorm: maxNorm, adamBeta1, adamBeta2, adamEpsilon, momentum, ademamix } = this.#options;
    const numbers = { beta1: adamBeta1, beta2: adamBeta2, eps: adamEpsilon, momentum, ...ademamix };
    const counted = { counters: this.#counters, lossScale: this.#scale };
    using norm = gradNorm(this.#counters.stream, [...this.#gradients, ...checks]);
    const applied = [...this.#groups.values()].map(({ op, rate, params, gradients, state }) =>
      optimizerStep(op, { params, gradients, norm, ...counted }, state, {
        ...numbers,
        lr: learningRate * rate,
        weightDecay,
        maxNorm,
        horizon: this.#totalSteps,
      }),
    );
    try {
      return finishStep(norm, applied, counted, this.lossScale ? growthInterval : 0);
    } finally {
      for (const tensor of applied) tensor.dispose();
    }
  }

  /**
   * Writes all state to one safetensors file, bit for bit, as it is after the steps enqueued before. Where state is paged
   * does not show in it.
   *
   * @throws ERR_QLORA_DISK_FULL, ERR_QLORA_WRITE_FAILED, ERR_QLORA_READ_FAILED
   */
  async save(path: string): Promise<void> {
    const items: SafetensorsItem[] = [...this.#allState()].map(([name, data]) => ({ name, data }));
    await writeSafetensors(path, items, { format: 'qlora-node optimizer', rule: this.#kindName });
  }

  /**
   * Takes the state that save() wrote, of the same parameters and kind of optimizer, paged or not.
   *
   * @throws ERR_QLORA_OPTIMIZER_STATE where the file is of another optimizer or of other parameters; what opening and
   *   reading a safetensors file throws
   */
  async load(path: string): Promise<void> {
    const state = this.#allState();
    using file = await openState(path, this.#kindName, state);
    await Promise.all([...state].map(([name, tensor]) => file.read(name, tensor)));
  }

  /** What runs under it may be taken over: paged or not is the same. */
  get #kindName(): string {
    const { rule, bits } = optimizerKinds[this.#options.optimizer];
    return `${rule} in ${bits} bits`;
  }

  #allState(): Map<string, Tensor> {
    const own = new Map(this.#state).set('counters', this.#counters);
    return this.lossScale ? own.set('loss_scale', this.#scale) : own;
  }

  dispose(): void {
    for (const p of this.#parameters.values()) {
      p.requiresGrad = false;
      p.gradient = undefined;
    }
    for (const t of [...this.#gradients, ...this.#state.values(), this.#counters, this.#scale]) t.dispose();
  }
}

/** The parameters whose state does not fit: the first ones stay in memory. */
function pagedNames(
  parameters: ReadonlyMap<string, Tensor>,
  options: ResolvedTrainerOptions,
  residentBytes: number,
): Set<string> {
  const { optimizer } = options;
  if (!optimizerKinds[optimizer].pages) {
    throw new QLoRAError('ERR_QLORA_INTERNAL', `the state of '${optimizer}' is not paged`);
  }
  let resident = 0;
  const paged = new Set<string>();
  for (const [name, { shape }] of parameters) {
    const bytes = stateBytes(options, [shape]);
    if (resident + bytes > residentBytes) paged.add(name);
    else resident += bytes;
  }
  return paged;
}
