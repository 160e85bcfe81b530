/** What a trainer leaves behind, read again. */
import { createHash } from 'node:crypto';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import t from 'tap';
import { promptTemplate } from '../../lib/data/templates.js';
import { QuantizedModel } from '../../lib/index.js';
import { create, demo, plain, rows, tiny } from '../support/trainers.js';

const hash = (values: Float32Array) => createHash('sha256').update(new Uint8Array(values.buffer)).digest('hex');

t.test('what is saved is what was trained', async (t) => {
  const logits = async (model: QuantizedModel) => hash(await model.logits(rows[3]?.inputIds as number[]));
  await t.test('an adapter', async (t) => {
    await using trainer = await create(t, {
      maxSteps: 4,
      lora: { r: 4, useDora: true, targetModules: ['q_proj', 'down_proj'] },
    });
    const { adapterDir } = await trainer.train();
    await using model = await QuantizedModel.load(tiny);
    await model.loadLora('again', adapterDir as string);
    t.same(await logits(model), await logits(trainer.model), 'bit for bit');
    await model.adapters.get('again')?.save(join(t.testdirName, 'copy'));
    for (const name of ['adapter_model.safetensors', 'adapter_config.json']) {
      t.same(
        readFileSync(join(t.testdirName, 'copy', name)).subarray(-1000),
        readFileSync(join(adapterDir as string, name)).subarray(-1000),
      );
    }
    await using goesOn = await create(t, { initialAdapter: adapterDir as string });
    t.same(await logits(goesOn.model), await logits(trainer.model), 'and training goes on from it');
    t.same(readdirSync(adapterDir as string).sort(), [
      'adapter_config.json',
      'adapter_model.safetensors',
      'checkpoint-4',
      'metrics.jsonl',
      'qlora_node.json',
      'report.html',
    ]);
  });
  await t.test('all weights', async (t) => {
    await using trainer = await create(t, { maxSteps: 4, lora: 'none', ...plain });
    t.equal(trainer.adapter, undefined);
    const { outputDir, adapterDir } = await trainer.train();
    t.equal(adapterDir, undefined);
    await using model = await QuantizedModel.load(outputDir, plain);
    t.same(await logits(model), await logits(trainer.model));
    await using before = await QuantizedModel.load(tiny, plain);
    t.notSame(await logits(before), await logits(model));
  });
  await t.test('an adapter that learnt nothing is refused', async (t) => {
    await using trainer = await create(t, { maxSteps: 2, learningRate: 0 });
    await t.rejects(async () => trainer.train(), { code: 'ERR_QLORA_ADAPTER_UNTRAINED', hint: String });
    t.notOk(existsSync(join(t.testdirName, 'out', 'adapter_model.safetensors')));
  });
  await t.test('the template goes with it', async (t) => {
    const question = { instruction: 'What is 3 plus 4?' };
    const options = { maxNewTokens: 12, doSample: true, temperature: 1.3, seed: 3 };
    const dataset = [{ ...question, output: 'seven' }];
    await using trainer = await create(t, { model: demo, dataset, template: 'alpaca-llama-factory', maxSteps: 2 });
    const { adapterDir } = await trainer.train();
    await using model = await QuantizedModel.load(demo);
    await model.loadLora('a', adapterDir as string);
    const { source, tail } = promptTemplate('alpaca-llama-factory');
    t.equal(await model.generate(question, options), await model.generate(source(question) + tail, options));
  });
  await t.test('with weights that were all trained, too, however often they are saved', async (t) => {
    const question = { instruction: 'What is 3 plus 4?' };
    const common = { model: demo, dataset: [{ ...question, output: 'seven' }], maxSteps: 1, ...plain } as const;
    await using trainer = await create(t, { ...common, template: 'alpaca-llama-factory', lora: 'none', saveSteps: 1 });
    const { outputDir } = await trainer.train();
    const { source, tail } = promptTemplate('alpaca-llama-factory');
    const check = async (model: QuantizedModel) =>
      t.equal(await model.generate(question), await model.generate(source(question) + tail));
    await check(trainer.model);
    await using whole = await QuantizedModel.load(outputDir);
    await check(whole);
    const four = join(t.testdirName, 'four bits');
    await whole.save(four);
    await using again = await QuantizedModel.load(four);
    await check(again);
    t.ok(existsSync(join(outputDir, 'checkpoint-1', 'qlora_node.json')));
    await using other = await QuantizedModel.load(demo);
    await other.save(four);
    t.notOk(existsSync(join(four, 'qlora_node.json')), 'nor does it stay where another model is saved');
  });
});
