/**
 * Greedy decoding of --batch sequences at once, and prefill of one.
 *
 * decodeTokensPerSecond is --new tokens a sequence over (time of --new + 1 tokens) - (time of 1 token), after a prompt of --prompt
 * tokens; prefillTokensPerSecond is --prefill prompt tokens over the time of one new token after them. Medians.
 * `share` is of decoding's floor, reading every quantized layer and the head once a token; `prefillShare` of prefill's,
 * the multiply-adds.
 */
import { resolveGenerateOptions } from '../lib/generate/options.js';
import { generateRows } from '../lib/generate/tokens.js';
import { QuantizedModel } from '../lib/index.js';
import { column, count, defineBench, megabytes, percent, rounded } from './bench.js';
import { flopPerToken } from './floor.js';
import { peakRssBytes } from './machine.js';
import { modelFolder, modelOptions } from './make-model.js';
import { measureRoofline } from './roofline.js';
import { median } from './timing.js';

export default defineBench({
  name: 'generate',
  about: 'greedy; share of reading the weights once a token, and of the multiply-adds of the prompt',
  options: {
    ...modelOptions,
    adapter: { type: 'boolean', default: false },
    r: { type: 'string', default: '16' },
    batch: { type: 'string', default: '1' },
    prompt: { type: 'string', default: '64' },
    new: { type: 'string', default: '128' },
    prefill: { type: 'string', default: '512' },
    runs: { type: 'string', default: '3' },
  },
  columns: [
    column('model', 14, 'model'),
    column('adapter', 7, 'adapter'),
    column('batch', 6, 'batch'),
    column('tokens/s', 9, 'decodeTokensPerSecond', 1),
    percent('share', 'share'),
    column('prefill tokens/s', 10, 'prefillTokensPerSecond', 1),
    percent('share', 'prefillShare'),
    megabytes('peak RSS', 'peakRssBytes'),
  ],
  async run(values, emit) {
    const { folder, model: name } = await modelFolder(values);
    const [promptLength, newTokens] = [count('prompt', values.prompt), count('new', values.new)];
    const prefillLength = count('prefill', values.prefill);
    const batch = count('batch', values.batch);
    const r = values.adapter ? count('r', values.r) : 0;
    await using model = await QuantizedModel.load(folder);
    if (r) model.addLora('bench', { r, alpha: r });
    const { config, weights } = model.core;

    const ids = (length: number) => Array.from({ length }, (_, i) => (i * 7919 + 13) % config.vocabSize);
    const seconds = async (length: number, maxNewTokens: number, rows = batch): Promise<number> => {
      const start = performance.now();
      const greedy = resolveGenerateOptions(model.core, { maxNewTokens, doSample: false }, 'tokens');
      const prompts = Array.from({ length: rows }, () => ids(length));
      let made = 0;
      for await (const _ of generateRows(model.core, prompts, { ...greedy, endTokens: new Set() })) made++;
      if (made !== maxNewTokens) throw new Error(`${made} tokens came, ${maxNewTokens} were asked for`);
      return (performance.now() - start) / 1000;
    };
    await seconds(promptLength, 2);
    await seconds(prefillLength, 1, 1);
    const decode: number[] = [];
    const prefill: number[] = [];
    for (let i = 0; i < count('runs', values.runs); i++) {
      decode.push(
        (batch * newTokens) / ((await seconds(promptLength, newTokens + 1)) - (await seconds(promptLength, 1))),
      );
      prefill.push(prefillLength / (await seconds(prefillLength, 1, 1)));
    }
    const peak = peakRssBytes();
    const roofline = await measureRoofline();
    const { linears, decoder } = weights;
    const bytesPerToken = linears.reduce((sum, { weight }) => sum + weight.sizeBytes, decoder.head.sizeBytes);
    const [decodeRate, prefillRate] = [median(decode), median(prefill)];
    // The head is for the last token of the prompt only.
    const { forward, head } = flopPerToken(model, prefillLength, r);
    const prefillFlop = forward - head * (1 - 1 / prefillLength);
    emit({
      model: name,
      adapter: values.adapter,
      batch,
      decodeTokensPerSecond: rounded(decodeRate),
      prefillTokensPerSecond: rounded(prefillRate),
      bytesPerToken,
      share: rounded(((decodeRate / batch) * bytesPerToken) / (roofline.readGigabytesPerSecond * 1e9)),
      prefillShare: rounded((prefillRate * prefillFlop) / (roofline.rooflineGflops * 1e9)),
      peakRssBytes: peak,
      ...roofline,
    });
  },
});
