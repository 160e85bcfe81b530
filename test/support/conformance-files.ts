/** What runs on a CUDA device, below test/ and without the end `.test.ts`. */
export const conformanceFiles = [
  'ops/device',
  'ops/recording',
  'ops/elementwise',
  'ops/rms-norm',
  'ops/quantize',
  'ops/matmul',
  'ops/projections',
  'ops/low-rank',
  'ops/attention',
  'ops/key-value-cache',
  'ops/loss',
  'ops/logits',
  'optimizers',
  'models/references',
];
