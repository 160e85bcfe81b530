/**
 * Reading a model folder and quantizing it to NF4 with double quantization, in a process of its own. The files come from
 * the system's cache after the first time; `share` is of the time in which memory could be read through once by as many
 * bytes as the files have.
 */
import { readdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { QuantizedModel } from '../lib/index.js';
import { column, count, defineBench, megabytes, percent, rounded } from './bench.js';
import { peakRssBytes, resetPeakRss } from './machine.js';
import { modelFolder, modelOptions } from './make-model.js';
import { measureRoofline } from './roofline.js';
import { median } from './timing.js';

export default defineBench({
  name: 'load',
  about: 'reading and quantizing a model, median; share of reading its files once from memory',
  options: { ...modelOptions, runs: { type: 'string', default: '3' } },
  columns: [
    column('model', 14, 'model'),
    megabytes('files', 'fileBytes'),
    megabytes('quantized', 'modelBytes'),
    column('s', 7, 'seconds', 3),
    column('s, first', 8, 'firstSeconds', 3),
    megabytes('peak RSS', 'peakRssBytes'),
    percent('share', 'share'),
  ],
  async run(values, emit) {
    const { folder, model } = await modelFolder(values);
    const seconds: number[] = [];
    let modelBytes = 0;
    resetPeakRss();
    for (let i = 0; i < count('runs', values.runs); i++) {
      const start = performance.now();
      await using loaded = await QuantizedModel.load(folder);
      seconds.push((performance.now() - start) / 1000);
      modelBytes = loaded.sizeBytes;
    }
    const peak = peakRssBytes();
    const files = readdirSync(folder).filter((name) => name.endsWith('.safetensors'));
    const fileBytes = files.reduce((sum, name) => sum + statSync(join(folder, name)).size, 0);
    const roofline = await measureRoofline();
    const typical = median(seconds);
    emit({
      model,
      fileBytes,
      modelBytes,
      seconds: rounded(typical),
      firstSeconds: rounded(seconds[0] as number),
      peakRssBytes: peak,
      share: rounded(fileBytes / (roofline.readGigabytesPerSecond * 1e9) / typical),
      ...roofline,
    });
  },
});
