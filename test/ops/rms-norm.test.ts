import { rmsNorm } from '../../lib/ops/rms-norm.js';
import { Tensor } from '../../lib/tensor.js';
import { checkMisuse, checkOps, forEachIsa, type OpCase, type Values } from '../support/op-harness.js';
import t from '../support/testing.js';

const eps = 1e-5;

function reference(D: number, offset: number) {
  return ({ x, weight }: Values): Float64Array => {
    const y = new Float64Array((x as Float64Array).length);
    for (let i = 0; i < y.length; i += D) {
      const row = (x as Float64Array).subarray(i, i + D);
      const rstd = 1 / Math.sqrt(row.reduce((sum, v) => sum + v * v, 0) / D + eps);
      row.forEach((v, d) => {
        y[i + d] = v * rstd * (((weight as Float64Array)[d] as number) + offset);
      });
    }
    return y;
  };
}

const cases: OpCase[] = [
  [3, 64, 0],
  [1, 3, 0],
  [37, 19, 1],
  [5, 2049, 0],
].map(([rows, D, offset]) => ({
  name: `rmsNorm [${rows}, ${D}] offset ${offset}`,
  inputs: {
    x: { shape: [rows as number, D as number], gradient: 'activation' },
    weight: { shape: [D as number], dtype: 'f32', gradient: 'parameter' },
  },
  run: (tape, { x, weight }) => rmsNorm(tape, x as Tensor, weight as Tensor, eps, offset),
  reference: reference(D as number, offset as number),
}));

await forEachIsa(t, import.meta.url, async () => {
  await checkOps(t, cases);
  await checkMisuse(t, [
    {
      name: 'a weight of another length',
      run: (s) => rmsNorm(undefined, new Tensor(s, 'f32', [2, 4]), new Tensor(s, 'f32', [5]), eps),
      code: 'ERR_QLORA_SHAPE',
      message: /weight must have shape \[4\], got \[5\]/,
    },
    {
      name: 'integers',
      run: (s) => rmsNorm(undefined, new Tensor(s, 'i32', [2, 4]), new Tensor(s, 'f32', [4]), eps),
      code: 'ERR_QLORA_DTYPE',
      message: /x must be f32 or bf16 or f16, got i32/,
    },
    {
      name: 'a tensor that nothing has written',
      run: (s) => rmsNorm(undefined, new Tensor(s, 'f32', [2, 4]), new Tensor(s, 'f32', [4]), eps).read(),
      code: 'ERR_QLORA_INTERNAL',
      message: /nothing has written/,
    },
  ]);
});
