/**
 * Reverse-mode differentiation: a tape that is passed along, never global state. An operation records how its output's
 * gradient becomes its inputs'; walking the tape backwards frees what each entry held right after it, so what lives when
 * is exact and no garbage collector is involved.
 */
import { Tensor } from './tensor.js';

/**
 * Gradients of the outputs (undefined where none arrived) to gradients of the inputs, in order; undefined where an input
 * needs none. It may return a gradient that it was given. Gradients of parameters are added to `parameter.gradient` by
 * the rule itself.
 */
export type BackwardRule = (outputGradients: readonly (Tensor | undefined)[]) => (Tensor | undefined)[];

interface Entry {
  inputs: readonly Tensor[];
  outputs: readonly Tensor[];
  saved: readonly Tensor[];
  rule: BackwardRule;
}

export class Tape {
  #entries: Entry[] = [];

  /**
   * Records an operation where one of its inputs needs a gradient, and marks its outputs so. `saved` is what the rule
   * reads: held until the rule has run.
   */
  record(inputs: readonly Tensor[], outputs: readonly Tensor[], saved: readonly Tensor[], rule: BackwardRule): void {
    if (inputs.some((t) => t.requiresGrad)) this.recordAlways(inputs, outputs, saved, rule);
  }

  /** Records even where no input needs a gradient: for an operation with parameters inside. */
  recordAlways(
    inputs: readonly Tensor[],
    outputs: readonly Tensor[],
    saved: readonly Tensor[],
    rule: BackwardRule,
  ): void {
    for (const output of outputs) output.requiresGrad = true;
    for (const tensor of saved) tensor.hold();
    this.#entries.push({ inputs, outputs, saved, rule });
  }

  /**
   * Runs the rules from `root`, whose gradient is given ([1] of ones for a loss), and empties the tape. Returns the
   * gradient of `wrt`, to be disposed of by the caller, where one was asked for and arrived.
   */
  backward(root: Tensor, gradient: Tensor, wrt?: Tensor): Tensor | undefined {
    const gradients = new Map<Tensor, Tensor>([[root, gradient.hold()]]);
    try {
      for (let entry = this.#entries.pop(); entry; entry = this.#entries.pop()) {
        const arrived = entry.outputs.map((output) => gradients.get(output));
        for (const output of entry.outputs) gradients.delete(output);
        try {
          if (arrived.some((g) => g !== undefined)) propagate(entry, arrived, gradients);
        } finally {
          for (const g of arrived) g?.release();
          for (const tensor of entry.saved) tensor.release();
        }
      }
      const result = wrt && gradients.get(wrt);
      return result?.view(result.shape);
    } finally {
      for (const g of gradients.values()) g.release();
      this.clear();
    }
  }

  /** Drops what was recorded. */
  clear(): void {
    for (const { saved } of this.#entries) for (const tensor of saved) tensor.release();
    this.#entries = [];
  }
}

/** Runs the entry's rule, and adds what it returns to the gradients of its inputs. */
function propagate(
  { inputs, rule }: Entry,
  arrived: readonly (Tensor | undefined)[],
  gradients: Map<Tensor, Tensor>,
): void {
  const results = rule(arrived);
  inputs.forEach((input, i) => {
    const result = results[i];
    if (result) accumulate(gradients, input, result);
  });
  for (const result of new Set(results)) if (result && !arrived.includes(result)) result.dispose();
}

/** A gradient in the map is held once; one that arrives for the second time is added to the first. */
function accumulate(gradients: Map<Tensor, Tensor>, input: Tensor, gradient: Tensor): void {
  const first = gradients.get(input);
  if (!first) {
    gradients.set(input, gradient.hold());
    return;
  }
  const sum = addTensors(first, gradient);
  first.release();
  gradients.set(input, sum.hold());
  sum.dispose();
}

function addTensors(a: Tensor, b: Tensor): Tensor {
  const sum = new Tensor(a.stream, a.dtype, a.shape);
  a.stream.run('add', a, b, sum);
  return sum;
}

/**
 * Runs fn without recording, and again when its gradient is needed: only x is kept meanwhile, and `needs`, what else fn
 * reads and its caller may dispose of. fn must compute the same both times.
 */
export function checkpoint(
  tape: Tape | undefined,
  x: Tensor,
  fn: (tape: Tape | undefined, x: Tensor) => Tensor,
  needs: readonly Tensor[] = [],
): Tensor {
  const y = fn(undefined, x);
  tape?.recordAlways([x], [y], [x, ...needs], ([dy]) => {
    const inner = new Tape();
    try {
      using input = x.view(x.shape);
      using again = fn(inner, input);
      return [inner.backward(again, dy as Tensor, input)];
    } finally {
      inner.clear();
    }
  });
  return y;
}
