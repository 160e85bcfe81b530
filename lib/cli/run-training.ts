/** A run from its options to its end, for `train` and `resume`. */
import { refuseFilled } from '../io/new-folder.js';
import { setLogger } from '../logger.js';
import { QLoRATrainer } from '../train/trainer.js';
import type { Entry } from './config/draft.js';
import { locate, type PlainOptions, trainerOptions } from './config/resolve.js';
import { exitCodes } from './exit-codes.js';
import type { Output } from './output.js';
import { listenForStop } from './signals.js';
import { trainingView } from './training-view.js';

export interface RunSettings {
  options: PlainOptions;
  resume: boolean | string;
  /** Where the merged model goes when the run is done. */
  exportDir?: string;
  places?: ReadonlyMap<string, Entry>;
  stopOnUsr1: boolean;
}

/** @returns the process's exit code */
export async function runTraining(settings: RunSettings, output: Output): Promise<number> {
  const { options, resume, exportDir, places = new Map(), stopOnUsr1 } = settings;
  const stopper = listenForStop({ onUsr1: stopOnUsr1 });
  const { loggingSteps = 10, maxSteps, epochs } = options as Record<string, number | undefined>;
  const view = trainingView(output, { loggingSteps, maxSteps, epochs });
  setLogger((level, message) => {
    if (level !== 'debug') view.log(level, message);
  });
  try {
    await using trainer = await QLoRATrainer.create(trainerOptions(options));
    // Known before hours of training, not after them.
    if (exportDir !== undefined) await refuseFilled(exportDir);
    const run = trainer.train({ resume });
    stopper.arm(() => {
      view.log('info', `${stopper.signal}: stopping with a checkpoint; Ctrl-C ends at once`);
      run.stop().catch(() => {});
    });
    for await (const event of run) view.event(event);
    const result = await run;
    view.result(result);
    if (result.stopped) return exitCodes.stopped;
    if (exportDir !== undefined) {
      await trainer.model.merge(exportDir);
      view.log('info', `merged into ${exportDir}`);
    }
    return exitCodes.done;
  } catch (error) {
    throw locate(error, places);
  } finally {
    view.close();
    setLogger(null);
    stopper.dispose();
  }
}
