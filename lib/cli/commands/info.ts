import { access } from 'node:fs/promises';
import { join } from 'node:path';
import type { Command } from 'commander';
import { bytes, thousands } from '../../format.js';
import { table } from '../format.js';
import type { AdapterFacts, ModelFacts } from '../model-facts.js';
import { addOutputFlags, makeOutput } from '../output.js';

export function define(command: Command): void {
  command.argument('<folder>', 'of a model or of an adapter');
  addOutputFlags(command);
  command.action(async (folder: string, flags: { json?: boolean; color?: boolean }) => {
    const output = makeOutput(flags);
    const { adapterFacts, modelFacts } = await import('../model-facts.js');
    const isAdapter = await access(join(folder, 'adapter_config.json')).then(
      () => true,
      () => false,
    );
    if (isAdapter) {
      const facts = await adapterFacts(folder);
      output.object(facts);
      for (const line of table(adapterRows(facts))) output.line(line);
    } else {
      const facts = await modelFacts(folder);
      output.object(facts);
      for (const line of table(modelRows(facts))) output.line(line);
      output.line();
      const rows = facts.shapes.map(({ module, shape, count }) => [module, shape.join(' x '), `${count}`]);
      for (const line of table([['module', 'shape', 'times'], ...rows])) output.line(line);
    }
  });
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
