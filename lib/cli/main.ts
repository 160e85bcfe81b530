#!/usr/bin/env node
/** The command `qlora-node`. What it does is imported after its signals are set up. */

// Node.js opens its inspector on SIGUSR1 unless somebody listens; a run that shall stop on it must never do that.
if (process.argv.includes('--stop-on-usr1')) process.on('SIGUSR1', () => {});

const { main } = await import('./program.js');
await main(process.argv);
