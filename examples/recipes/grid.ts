/** What is trained: the files beside this one in their two spellings, and the points of Raschka's grid. */

export interface Recipe {
  /** Of its file, without the ending. */
  name: string;
  /** What is changed, in words. */
  change: string;
  /** Options that win over the file, under our names. */
  overrides: Readonly<Record<string, string | number>>;
}

export const families = ['guanaco', 'lora-land', 'raschka'] as const;
/** What stands between the family's name and .yaml. */
export const spellings = ['', '.llama-factory'] as const;

const all = { 'lora.targetModules': 'all-linear' };
const sgd = { optimizer: 'sgd', learningRate: 1 };

/** Each changes some options of raschka.yaml. */
const grid: readonly Omit<Recipe, 'name'>[] = [
  { change: 'alpha 8', overrides: { 'lora.alpha': 8 } },
  { change: 'alpha 32', overrides: { 'lora.alpha': 32 } },
  { change: 'r 64, alpha 128', overrides: { 'lora.r': 64, 'lora.alpha': 128 } },
  { change: 'all layers', overrides: all },
  { change: 'all layers, r 64, alpha 16', overrides: { ...all, 'lora.r': 64, 'lora.alpha': 16 } },
  { change: 'all layers, r 64, alpha 128', overrides: { ...all, 'lora.r': 64, 'lora.alpha': 128 } },
  { change: 'all layers, cosine', overrides: { ...all, lrScheduler: 'cosine' } },
  { change: 'all layers, SGD', overrides: { ...all, optimizer: 'sgd' } },
  { change: 'all layers, SGD, rate 1', overrides: { ...all, ...sgd } },
  { change: 'all layers, SGD, rate 1, cosine', overrides: { ...all, ...sgd, lrScheduler: 'cosine' } },
];

export const recipes: readonly Recipe[] = [
  ...families.flatMap((family) =>
    spellings.map((spelling) => ({ name: `${family}${spelling}`, change: '', overrides: {} })),
  ),
  ...grid.map((point) => ({ name: 'raschka', ...point })),
];
