import cliProgress from 'cli-progress';

export interface Progress {
  update(done: number, note?: string): void;
  stop(): void;
}

/** A bar on a terminal; elsewhere a plain line for every tenth of the way. */
export function progress(label: string, total: number, output: NodeJS.WriteStream = process.stdout): Progress {
  return output.isTTY ? bar(label, total, output) : lines(label, total, output);
}

function bar(label: string, total: number, stream: NodeJS.WriteStream): Progress {
  const single = new cliProgress.SingleBar(
    { format: '  {label} {bar} {percentage}%  {note}', hideCursor: true, stream, fps: 8, gracefulExit: false },
    cliProgress.Presets.shades_classic,
  );
  let shown = '';
  single.start(total, 0, { label, note: shown });
  return {
    update: (done, note = shown) => {
      shown = note;
      single.update(done, { label, note });
    },
    stop: () => single.stop(),
  };
}

function lines(label: string, total: number, output: NodeJS.WritableStream): Progress {
  let tenths = 0;
  return {
    update: (done, note) => {
      const now = Math.floor((10 * done) / total);
      if (now <= tenths) return;
      tenths = now;
      output.write(`  ${label} ${10 * now}%${note ? `  ${note}` : ''}\n`);
    },
    stop: () => {},
  };
}
