import { join } from 'node:path';
import type { Command } from 'commander';
import { bytes, thousands } from '../../format.js';
import { table } from '../format.js';
import { isThere } from '../load-model.js';
import type { MemoryFacts } from '../memory-facts.js';
import type { AdapterFacts, ModelFacts } from '../model-facts.js';
import { addOutputFlags, makeOutput, type Output } from '../output.js';

export function define(command: Command): void {
  command.argument('<folder>', 'of a model or of an adapter');
  addOutputFlags(command);
  command.action(async (folder: string, flags: { json?: boolean; color?: boolean }) => {
    const output = makeOutput(flags);
    const { adapterFacts, modelFacts } = await import('../model-facts.js');
    const isAdapter = await isThere(join(folder, 'adapter_config.json'));
    if (isAdapter) {
      const facts = await adapterFacts(folder);
      const base = await foundBase(facts.baseModel);
      const memory = base === undefined ? undefined : await planned(base, folder);
      output.object({ ...facts, memory });
      for (const line of table(adapterRows(facts))) output.line(line);
      if (memory) writeMemory(memory, 'going on with this adapter', output);
    } else {
      const facts = await modelFacts(folder);
      const memory = await planned(folder);
      output.object({ ...facts, memory });
      for (const line of table(modelRows(facts))) output.line(line);
      output.line();
      const rows = facts.shapes.map(({ module, shape, count }) => [module, shape.join(' x '), `${count}`]);
      for (const line of table([['module', 'shape', 'times'], ...rows])) output.line(line);
      writeMemory(memory, 'a new adapter with the defaults', output);
    }
  });
}

/** The folder of an adapter's base, where it is here or in the cache of the hub. */
async function foundBase(name: string | undefined): Promise<string | undefined> {
  if (name === undefined) return undefined;
  const { locate } = await import('../../io/hub.js');
  const folder = await locate(name, 'model', { offline: true }).catch(() => undefined);
  return folder !== undefined && (await isThere(join(folder, 'config.json'))) ? folder : undefined;
}

/** What is known of a folder is worth showing although no memory can be planned. */
async function planned(model: string, adapter?: string): Promise<MemoryFacts | { error: string }> {
  try {
    const { memoryFacts } = await import('../memory-facts.js');
    return await memoryFacts(model, adapter);
  } catch (error) {
    return { error: (error as Error).message };
  }
}

function writeMemory(memory: MemoryFacts | { error: string }, what: string, output: Output): void {
  output.line();
  if ('error' in memory) {
    output.line(`memory cannot be planned: ${memory.error}`);
    return;
  }
  const { rowTokens, loading, training, withoutCheckpointing } = memory;
  const plans = [loading, training, withoutCheckpointing];
  const classes = Object.keys(loading) as (keyof typeof loading)[];
  const rows = classes.map((name) => [name, ...plans.map((plan) => bytes(plan[name] ?? 0))]);
  for (const line of table([['memory', 'loading', 'training', 'without checkpointing'], ...rows])) output.line(line);
  output.line(`Training: ${what}, rows of up to ${rowTokens} tokens. \`qlora-node plan\` takes your rows and options.`);
}

function modelRows(facts: ModelFacts): string[][] {
  const { family, layers, hiddenSize, intermediateSize, heads, kvHeads, headDim, vocabSize, tiedHead } = facts;
  return [
    ['family', family],
    ['layers', `${layers}`],
    ['hidden size', `${hiddenSize}, in the MLP ${intermediateSize}`],
    ['attention', `${heads} heads of ${headDim}, ${kvHeads} of keys and values`],
    ['vocabulary', `${vocabSize}${tiedHead ? ', the head is the embedding' : ''}`],
    ['stored in', facts.storedIn],
    ['parameters', thousands(facts.parameters)],
    ['in linear layers', thousands(facts.linearParameters)],
    ['weights in 16 bits', bytes(facts.bytesIn16Bit)],
    ['weights in 4 bits', bytes(facts.bytesIn4Bit)],
  ];
}

function adapterRows(facts: AdapterFacts): string[][] {
  const { baseModel, r, alpha, dropout, targetModules, modulesToSave, useRslora, useDora, template } = facts;
  const variants = [...(useRslora ? ['rsLoRA'] : []), ...(useDora ? ['DoRA'] : [])];
  return [
    ['adapter', ['LoRA', ...variants].join(', ')],
    ['base model', baseModel ?? 'not named'],
    ['rank', `${r}`],
    ['alpha', `${alpha}`],
    ['dropout', `${dropout}`],
    ['targets', typeof targetModules === 'string' ? targetModules : targetModules.join(', ')],
    ...(modulesToSave.length > 0 ? [['trained whole', modulesToSave.join(', ')]] : []),
    ['template', template ?? 'not recorded'],
    ['tensors', `${facts.tensors}`],
    ['parameters', thousands(facts.parameters)],
  ];
}
