import { type RopeTable, ropeTable } from '../ops/rope.js';
import { type Stream, Tensor } from '../tensor.js';
import { dependsOnLength, type Rope, ropeFrequencies } from './rope.js';

/** The table of a pass's positions, which can be filled again for those of the next. To be disposed of. */
export class RopeInput implements RopeTable, Disposable {
  /** f32 [M, R / 2] */
  readonly cos: Tensor;
  readonly sin: Tensor;
  /** f32 [R / 2]; undefined where they depend on the length. */
  readonly #frequencies: { inverse: Tensor; factor: number } | undefined;

  constructor(
    readonly stream: Stream,
    private readonly rope: Rope,
    private readonly size: number,
  ) {
    this.cos = new Tensor(stream, 'f32', [size, rope.rotaryDim / 2]);
    this.sin = new Tensor(stream, 'f32', [size, rope.rotaryDim / 2]);
    if (dependsOnLength(rope)) return;
    const { inverseFrequencies, factor } = ropeFrequencies(rope, 1);
    this.#frequencies = { inverse: Tensor.from(stream, inverseFrequencies, [inverseFrequencies.length]), factor };
  }

  /** @param positions [M] of rows of `length` tokens */
  write(positions: Int32Array, length: number): void {
    if (!this.#frequencies) {
      this.#writeBySequence(positions, length);
      return;
    }
    using at = Tensor.from(this.stream, positions, [this.size]);
    ropeTable(at, this.#frequencies.inverse, this.#frequencies.factor, this);
  }

  /** Where the frequencies depend on the sequence's length, each sequence turns by its own. */
  #writeBySequence(positions: Int32Array, length: number): void {
    const half = this.rope.rotaryDim / 2;
    const cos = new Float32Array(positions.length * half);
    const sin = new Float32Array(positions.length * half);
    for (let begin = 0; begin < positions.length; ) {
      // A sequence ends where positions start again, and at the end of its row.
      let end = begin + 1;
      while (
        end < positions.length &&
        end % length !== 0 &&
        (positions[end] as number) > (positions[end - 1] as number)
      ) {
        end++;
      }
      const { inverseFrequencies, factor } = ropeFrequencies(this.rope, (positions[end - 1] as number) + 1);
      for (let i = begin; i < end; i++) {
        inverseFrequencies.forEach((f, j) => {
          const angle = Math.fround((positions[i] as number) * f);
          cos[i * half + j] = Math.cos(angle) * factor;
          sin[i * half + j] = Math.sin(angle) * factor;
        });
      }
      begin = end;
    }
    // A failed write is passed on to whoever reads the table.
    this.cos.write(cos).catch(() => {});
    this.sin.write(sin).catch(() => {});
  }

  [Symbol.dispose](): void {
    this.#frequencies?.inverse.dispose();
    this.cos.dispose();
    this.sin.dispose();
  }
}
