/**
 * Training steps of LoRA over a 4-bit base. Every token is random and a target. A step is forward, backward and AdamW over
 * the adapter, r 16 on all linear layers; two steps come before those that are timed.
 *
 * `hostShare` is the main thread's processor time, JavaScript and enqueueing, over the time of the steps;
 * `minorFaultsPerStep` counts pages that are touched for the first time.
 *
 * `share` is of the floor: the step's arithmetic at the rate of the machine's multiply-adds, with the recomputation that
 * `--checkpointing on` asks for ('auto' is held to the floor without it).
 */
import { monitorEventLoopDelay } from 'node:perf_hooks';
import { QLoRATrainer, QuantizedModel } from '../lib/index.js';
import { choice, column, count, defineBench, megabytes, percent, rounded } from './bench.js';
import { flopPerToken } from './floor.js';
import { mainThreadSeconds, peakRssBytes, resetPeakRss } from './machine.js';
import { modelFolder, modelOptions } from './make-model.js';
import { measureRoofline } from './roofline.js';
import { temporaryFolder } from './temporary.js';
import { median } from './timing.js';

const checkpointingModes = { on: true, off: false, auto: 'auto' } as const;

export default defineBench({
  name: 'train',
  about: 'LoRA on all linear layers; share of the floor, the arithmetic of a step at the rate of multiply-adds',
  options: {
    ...modelOptions,
    batch: { type: 'string', default: '1' },
    sequence: { type: 'string', default: '512' },
    checkpointing: { type: 'string', default: 'off' },
    steps: { type: 'string', default: '4' },
    r: { type: 'string', default: '16' },
  },
  columns: [
    column('model', 14, 'model'),
    { title: 'batch', width: 8, text: (m) => `${m.batch} x ${m.sequence}` },
    column('checkpointing', 13, 'checkpointing'),
    column('tokens/s', 8, 'tokensPerSecond', 1),
    percent('share', 'share'),
    megabytes('peak RSS', 'peakRssBytes'),
    percent('host', 'hostShare'),
    column('loop p99 ms', 11, 'eventLoopDelayP99Ms', 1),
    column('faults/step', 11, 'minorFaultsPerStep', 1),
  ],
  async run(values, emit) {
    const [batch, sequence, steps, r] = (['batch', 'sequence', 'steps', 'r'] as const).map((name) =>
      count(name, values[name]),
    ) as [number, number, number, number];
    const checkpointing = choice('checkpointing', values.checkpointing, ['on', 'off', 'auto']);
    const { folder, model: name } = await modelFolder(values);
    const began = performance.now();
    await using model = await QuantizedModel.load(folder);
    const loadSeconds = (performance.now() - began) / 1000;
    const loadPeakRssBytes = peakRssBytes();

    let seed = 1;
    const random = () => {
      seed = (Math.imul(seed, 1103515245) + 12345) & 0x7fffffff;
      return seed % model.core.config.vocabSize;
    };
    const rows = Array.from({ length: batch }, () => ({ inputIds: Array.from({ length: sequence }, random) }));
    resetPeakRss();
    await using trainer = await QLoRATrainer.create({
      model,
      dataset: rows,
      outputDir: temporaryFolder(),
      lora: { r, alpha: 16 },
      batchSize: batch,
      gradientAccumulationSteps: 1,
      gradientCheckpointing: checkpointingModes[checkpointing],
    });
    for (let i = 0; i < 2; i++) await trainer.trainStep(rows);
    const faults = process.resourceUsage().minorPageFault;
    const host = mainThreadSeconds();
    const seconds: number[] = [];
    let loss = 0;
    for (let i = 0; i < steps; i++) {
      const start = performance.now();
      ({ loss } = await trainer.trainStep(rows));
      seconds.push((performance.now() - start) / 1000);
    }
    const hostShare = (mainThreadSeconds() - host) / seconds.reduce((sum, s) => sum + s, 0);
    const minorFaultsPerStep = (process.resourceUsage().minorPageFault - faults) / steps;
    // In a step of its own, since sampling every millisecond is work of the main thread too.
    const delay = monitorEventLoopDelay({ resolution: 1 });
    delay.enable();
    await trainer.trainStep(rows);
    delay.disable();
    const peak = peakRssBytes();
    const tokensPerSecond = (batch * sequence) / median(seconds);
    const roofline = await measureRoofline();
    const { forward, backward, recompute } = flopPerToken(model.core, sequence, r);
    const flop = forward + backward + (checkpointing === 'on' ? recompute : 0);
    emit({
      model: name,
      batch,
      sequence,
      checkpointing,
      r,
      tokensPerSecond: rounded(tokensPerSecond),
      millisecondsPerStep: seconds.map((s) => Math.round(s * 1000)),
      peakRssBytes: peak,
      share: rounded((tokensPerSecond * flop) / (roofline.rooflineGflops * 1e9)),
      floorTokensPerSecond: rounded((roofline.rooflineGflops * 1e9) / flop),
      gflopPerToken: rounded(flop / 1e9),
      hostShare: rounded(hostShare),
      eventLoopDelayP99Ms: rounded(delay.percentile(99) / 1e6),
      minorFaultsPerStep,
      countedPeakBytes: model.memory().peakBytes,
      loadSeconds: rounded(loadSeconds),
      loadPeakRssBytes,
      loss,
      ...roofline,
    });
  },
});
