/** What a process ends with. docs/cli.md has the same table. */
export const exitCodes = {
  done: 0,
  /** Something failed; stderr says what. */
  error: 1,
  /** A wrong command, flag or configuration; nothing was started. */
  usage: 2,
  /** Stopped by Ctrl-C, SIGTERM or SIGUSR1 with what was done kept: `qlora-node resume` goes on. */
  stopped: 75,
  /** Ctrl-C twice, or before training began: ended at once. */
  interrupted: 130,
} as const;

export const exitCodesHelp = `
Exit codes:
  0    done
  1    an error; stderr says which
  2    a wrong command, flag or configuration
  75   stopped with a checkpoint: go on with \`qlora-node resume RUN_DIR\`
  130  Ctrl-C twice, or before training began
`;
