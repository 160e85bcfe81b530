/**
 * Causal attention with grouped heads in bf16, forward and backward. `share` is of the matmul roofline: 4 D FLOP a head
 * and visible pair forward, 2.5 times as many backward, where the scores are made again.
 */
import { Stream, Tensor } from '../lib/tensor.js';
import { amount, column, count, counts, defineBench, percent, rounded } from './bench.js';
import { filled } from './matmul.js';
import { measureRoofline } from './roofline.js';
import { leastMs } from './timing.js';

export default defineBench({
  name: 'attention',
  about: 'causal, 4 query heads a key head, bf16; share of the multiply-adds',
  options: {
    sequence: { type: 'string', default: '512,2048' },
    'head-size': { type: 'string', default: '64,128' },
    heads: { type: 'string', default: '32' },
    'kv-heads': { type: 'string', default: '8' },
    seconds: { type: 'string', default: '0.7' },
  },
  columns: [
    column('sequence', 8, 'sequence'),
    column('head size', 9, 'headSize'),
    column('heads', 5, 'heads'),
    column('kv heads', 8, 'kvHeads'),
    column('direction', 9, 'direction'),
    column('ms', 9, 'ms', 3),
    percent('share', 'share'),
  ],
  async run(values, emit) {
    const [heads, kvHeads] = [count('heads', values.heads), count('kv-heads', values['kv-heads'])];
    const seconds = amount('seconds', values.seconds);
    const roofline = await measureRoofline();
    const stream = new Stream();
    for (const sequence of counts('sequence', values.sequence)) {
      for (const headSize of counts('head-size', values['head-size'])) {
        const [wide, narrow] = [
          [1, sequence, heads, headSize],
          [1, sequence, kvHeads, headSize],
        ];
        using q = filled(stream, wide);
        using k = filled(stream, narrow);
        using v = filled(stream, narrow);
        using dout = filled(stream, wide);
        using out = new Tensor(stream, 'bf16', wide);
        using logSumExp = new Tensor(stream, 'f32', [1, heads, sequence]);
        using dq = new Tensor(stream, 'bf16', wide);
        using dk = new Tensor(stream, 'bf16', narrow);
        using dv = new Tensor(stream, 'bf16', narrow);
        // Scale, causal, no window, no cap of the scores.
        const rules = [headSize ** -0.5, 1, 0, 0];
        const forward = () => stream.run('attentionForward', q, k, v, null, null, null, out, logSumExp, ...rules);
        const backward = () =>
          stream.run('attentionBackward', dout, q, k, v, out, logSumExp, null, null, dq, dk, dv, ...rules);
        const flop = 2 * sequence * (sequence + 1) * heads * headSize;
        for (const [direction, enqueue, work] of [
          ['forward', forward, flop],
          ['backward', backward, 2.5 * flop],
        ] as const) {
          const ms = await leastMs(stream, seconds, enqueue);
          const share = rounded(work / roofline.rooflineGflops / 1e6 / ms);
          emit({ sequence, headSize, heads, kvHeads, direction, ms: rounded(ms), share, ...roofline });
        }
      }
    }
    await stream.close();
  },
});
