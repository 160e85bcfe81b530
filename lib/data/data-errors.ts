/** Errors of data files, each with the file and where in it. */
import { QLoRAError } from '../errors.js';

export function unreadable(path: string, error: NodeJS.ErrnoException): QLoRAError {
  const gone = error.code === 'ENOENT' || error.code === 'ENOTDIR';
  const what = gone ? `There is no data set at ${path}` : `The data set at ${path} cannot be read: ${error.message}`;
  return new QLoRAError(gone ? 'ERR_QLORA_DATASET_NOT_FOUND' : 'ERR_QLORA_IO', what, {
    hint: 'Check the path; a relative one starts at the working directory of the process.',
    detail: { path },
    cause: error,
  });
}

export function wrongFormat(message: string, path: string, hint?: string): QLoRAError {
  return new QLoRAError('ERR_QLORA_DATASET_FORMAT', message, {
    hint: hint ?? 'Write one JSON object a line into a .jsonl file, or pass rows from your program.',
    detail: { path },
  });
}

/** What is in a file is damaged: cut short, or not what its name says. */
export function damaged(path: string, line: number | undefined, what: string, cause?: unknown): QLoRAError {
  const where = line === undefined ? path : `line ${line} of ${path}`;
  return new QLoRAError('ERR_QLORA_DATASET_INVALID', `What is in ${where} cannot be used: ${what}`, {
    hint: 'Get the file again, or correct it at that place.',
    detail: { path, line },
    cause,
  });
}
