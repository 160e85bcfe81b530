/**
 * Event files as TensorBoard reads them: records of TFRecord, each an Event of TensorFlow's event.proto. Only what
 * curves need is written, so the few fields are encoded by hand.
 */
import { hostname } from 'node:os';
import { join } from 'node:path';
import { makeFolder } from '../io/folder.js';
import type { TrainEvent } from '../train/events.js';
import { AppendFile } from './append-file.js';

/** Tags of the numbers of an event. */
const tags = {
  step: {
    'train/loss': 'loss',
    'train/learning_rate': 'learningRate',
    'train/grad_norm': 'gradNorm',
    'train/tokens_per_second': 'tokensPerSecond',
  },
  eval: { 'eval/loss': 'loss', 'eval/perplexity': 'perplexity' },
} as const;

export interface EventFileOptions {
  /** Readers forget what earlier files of the folder have of later steps. */
  resumeAt?: number;
  /** Seconds since 1970; default: the clock. */
  now?(): number;
}

/** A file in `folder`, which is made with the first flush. */
export class TensorBoardFile {
  readonly #folder: string;
  readonly #file: AppendFile;
  readonly #now: () => number;
  #ready: Promise<void> | undefined;

  constructor(folder: string, { resumeAt, now = () => Date.now() / 1000 }: EventFileOptions = {}) {
    this.#folder = folder;
    this.#now = now;
    const seconds = String(Math.floor(now())).padStart(10, '0');
    this.#file = new AppendFile(join(folder, `events.out.tfevents.${seconds}.${hostname()}.${process.pid}.0`));
    this.#file.add(record([double(1, now()), text(3, 'brain.Event:2')]));
    // SessionLog with status START: steps from this one on are purged from what came before.
    if (resumeAt !== undefined) {
      this.#file.add(record([double(1, now()), integer(2, resumeAt + 1), message(7, [integer(1, 1)])]));
    }
  }

  event(event: Extract<TrainEvent, { type: 'step' | 'eval' }>): void {
    const numbers = event as unknown as Record<string, number>;
    const values = Object.entries(tags[event.type]).map(([tag, field]) =>
      message(1, [text(1, tag), float(2, numbers[field] as number)]),
    );
    this.#file.add(record([double(1, this.#now()), integer(2, event.step), message(5, values)]));
  }

  async flush(): Promise<void> {
    this.#ready ??= makeFolder(this.#folder);
    try {
      await this.#ready;
    } catch (error) {
      this.#ready = undefined;
      throw error;
    }
    await this.#file.flush();
  }

  close(): Promise<void> {
    return this.#file.close();
  }
}

/** Protocol buffers: each field is its number and wire type, then the value. */
function key(field: number, wireType: number): Buffer {
  return Buffer.of((field << 3) | wireType);
}

function varint(value: number): Buffer {
  const bytes: number[] = [];
  for (; value > 127; value = Math.floor(value / 128)) bytes.push((value % 128) | 128);
  return Buffer.of(...bytes, value);
}

function integer(field: number, value: number): Buffer {
  return Buffer.concat([key(field, 0), varint(value)]);
}

function double(field: number, value: number): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeDoubleLE(value);
  return Buffer.concat([key(field, 1), bytes]);
}

function float(field: number, value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeFloatLE(value);
  return Buffer.concat([key(field, 5), bytes]);
}

function message(field: number, fields: readonly Buffer[]): Buffer {
  const body = Buffer.concat(fields);
  return Buffer.concat([key(field, 2), varint(body.length), body]);
}

function text(field: number, value: string): Buffer {
  return message(field, [Buffer.from(value)]);
}

/** TFRecord: length, its checksum, the data, its checksum; all little-endian. */
function record(fields: readonly Buffer[]): Buffer {
  const data = Buffer.concat(fields);
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(data.length));
  return Buffer.concat([length, maskedChecksum(length), data, maskedChecksum(data)]);
}

/** CRC-32C (Castagnoli), rotated and moved, so that a checksum over data with checksums in it keeps its strength. */
function maskedChecksum(data: Buffer): Buffer {
  let crc = 0xffffffff;
  for (const byte of data) crc = (crc >>> 8) ^ (castagnoli[(crc ^ byte) & 255] as number);
  crc = ~crc;
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE((((crc >>> 15) | (crc << 17)) + 0xa282ead8) >>> 0);
  return bytes;
}

const castagnoli = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? (n >>> 1) ^ 0x82f63b78 : n >>> 1;
  return n;
});
