/**
 * What checkpointed blocks keep for the backward pass, in pinned memory of the host meanwhile. A block's input leaves
 * while the block is computed, and comes back while the block above is computed again, so that a device holds about two
 * of them, however many blocks there are. The last block's stays: the backward pass begins with it.
 */
import type { Tape } from '../autograd.js';
import type { Tensor } from '../tensor.js';

type Block = (tape: Tape | undefined, x: Tensor) => Tensor;

/** Of one pass. */
export class ActivationOffloading {
  readonly #inputs: Tensor[] = [];

  /** @param blocks that are checkpointed */
  constructor(private readonly blocks: number) {}

  /** The next block, whose input is x, for `checkpoint()`: that runs it without a tape, and again with one. */
  around(x: Tensor, run: Block): Block {
    const index = this.#inputs.push(x) - 1;
    const leaves = index < this.blocks - 1;
    return (tape, input) => {
      if (tape) {
        x.finishMove();
        this.#inputs[index - 1]?.startMove('device');
        return run(tape, input);
      }
      if (leaves) x.startMove('host');
      const y = run(undefined, input);
      x.finishMove();
      return y;
    };
  }
}
