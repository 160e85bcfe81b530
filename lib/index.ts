/** The public face of qlora-node. */

export type { Preflight } from './data/preflight.js';
export type { DatasetSource } from './data/read-rows.js';
export type { Message, Row } from './data/rows.js';
export { backends, memory } from './devices.js';
export { QLoRAError } from './errors.js';
export type { GenerateOptions } from './generate/options.js';
export { setLogger } from './logger.js';
export type { LoraAdapter, LoraOptions } from './models/lora-adapter.js';
export type { LoraLinear } from './nn/lora.js';
export { dequantize, type QuantizedData, type QuantizeOptions, quantize } from './quantization.js';
export {
  type AdapterChoice,
  type ChatMessage,
  type LoadOptions,
  type MemoryUse,
  QuantizedModel,
  type TextStream,
  type TokenStream,
} from './quantized-model.js';
export type { Device } from './tensor.js';
export type { TrainEvent, TrainResult, TrainRun } from './train/events.js';
export type { MixedDataset, TrainerOptions } from './train/options.js';
export type { MemoryPlan } from './train/rehearsal.js';
export { QLoRATrainer } from './train/trainer.js';
