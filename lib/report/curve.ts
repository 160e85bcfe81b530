/** The steps of a run in bounded memory, however long it is. */
import type { TrainEvent } from '../train/events.js';

export type StepEvent = Extract<TrainEvent, { type: 'step' }>;

const fields = ['step', 'loss', 'learningRate', 'gradNorm', 'tokensPerSecond', 'memoryBytes'] as const;
export type CurveField = (typeof fields)[number];

/** How points that lie in one are shown by it: a rate moves evenly, of memory the most counts. */
const merge: Record<CurveField, (a: number, b: number) => number> = {
  step: (_, b) => b,
  loss: mean,
  learningRate: (_, b) => b,
  gradNorm: mean,
  tokensPerSecond: mean,
  memoryBytes: (a, b) => Math.max(a, b),
};

/** Keeps each step until there are `most`; then two neighbours become one, and so on. */
export class Curve {
  readonly #most: number;
  readonly #columns: Record<CurveField, number[]>;
  /** Steps in a point, and in the last one. */
  #stride = 1;
  #inLast = 0;

  /** @param most an even number of points */
  constructor(most = 2000) {
    this.#most = most;
    this.#columns = Object.fromEntries(fields.map((field) => [field, []])) as unknown as Record<CurveField, number[]>;
  }

  push(step: StepEvent): void {
    if (this.#inLast === this.#stride || this.length === 0) {
      if (this.length === this.#most) this.#halve();
      for (const field of fields) this.#columns[field].push(finite(step[field]));
      this.#inLast = 1;
      return;
    }
    const share = 1 / ++this.#inLast;
    for (const field of fields) {
      const column = this.#columns[field];
      const last = column.at(-1) as number;
      const value = finite(step[field]);
      // A mean over all in the point, not over the last two.
      column[column.length - 1] = merge[field] === mean ? weighted(last, value, share) : merge[field](last, value);
    }
  }

  get length(): number {
    return this.#columns.step.length;
  }

  /** NaN where a step's number was not finite. */
  column(field: CurveField): readonly number[] {
    return this.#columns[field];
  }

  #halve(): void {
    for (const field of fields) {
      const column = this.#columns[field];
      this.#columns[field] = Array.from({ length: column.length / 2 }, (_, i) =>
        merge[field](column[2 * i] as number, column[2 * i + 1] as number),
      );
    }
    this.#stride *= 2;
  }
}

/** JSON has null for what is not finite. */
function finite(value: number | null): number {
  return value !== null && Number.isFinite(value) ? value : Number.NaN;
}

function mean(a: number, b: number): number {
  return weighted(a, b, 0.5);
}

/** What is not finite does not count, unless there is nothing else. */
function weighted(a: number, b: number, share: number): number {
  if (Number.isNaN(a)) return b;
  return Number.isNaN(b) ? a : a + (b - a) * share;
}

/**
 * Each value as the mean of those at most a sixtieth of all steps away. By steps and not by points, since of the part
 * before a resume fewer steps are known.
 */
export function smooth(steps: readonly number[], values: readonly number[]): number[] {
  const reach = Math.round(((steps.at(-1) ?? 0) - (steps[0] ?? 0)) / 60);
  let [from, to, sum, count] = [0, 0, 0, 0];
  const take = (value: number, sign: 1 | -1) => {
    if (Number.isNaN(value)) return;
    sum += sign * value;
    count += sign;
  };
  return steps.map((step) => {
    for (; to < steps.length && (steps[to] as number) <= step + reach; to++) take(values[to] as number, 1);
    for (; (steps[from] as number) < step - reach; from++) take(values[from] as number, -1);
    return count === 0 ? Number.NaN : sum / count;
  });
}
