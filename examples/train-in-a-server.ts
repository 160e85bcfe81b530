/**
 * A web server that trains in the background and streams how far it is, while it goes on to answer.
 *
 *   node dist/examples/train-in-a-server.js [port] [output folder]
 *   curl -X POST localhost:8080/train; curl -N localhost:8080/progress; curl 'localhost:8080/ask?Double+21.'
 */
import { createServer, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { QLoRATrainer, QuantizedModel, type TrainEvent, type TrainRun } from '../lib/index.js';

const [port = '8080', outputDir = 'demo-output/train-in-a-server'] = process.argv.slice(2);

// One model for all: it answers with the adapter as it is at that moment, also while that is being trained.
await using model = await QuantizedModel.load('examples/demo/model');
await using trainer = await QLoRATrainer.create({
  model,
  dataset: Array.from({ length: 48 }, (_, n) => ({ instruction: `Double ${n}.`, output: String(2 * n) })),
  outputDir,
  lora: { r: 16, alpha: 16 },
  batchSize: 16,
  gradientAccumulationSteps: 1,
  maxSteps: 30,
  learningRate: 4e-3,
});

let run: TrainRun | undefined;
const watchers = new Set<ServerResponse>();
const past: string[] = [];

/** Server-sent events: each is a line that begins with 'data: ', and an empty line. */
function tell(event: TrainEvent | { type: 'done'; steps: number }): void {
  const text = `data: ${JSON.stringify(event)}\n\n`;
  past.push(text);
  for (const watcher of watchers) watcher.write(text);
}

async function train(): Promise<void> {
  run = trainer.train();
  for await (const event of run) tell(event);
  tell({ type: 'done', steps: (await run).steps });
}

const server = createServer(async (request, response) => {
  const { pathname, search } = new URL(request.url ?? '/', 'http://localhost');
  if (request.method === 'POST' && pathname === '/train') {
    if (!run) train().catch(console.error);
    response.writeHead(202).end('training\n');
  } else if (pathname === '/progress') {
    response.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-store' });
    response.write(past.join(''));
    watchers.add(response);
    response.on('close', () => watchers.delete(response));
  } else if (pathname === '/ask') {
    response.writeHead(200, { 'content-type': 'text/plain; charset=utf-8' });
    const instruction = decodeURIComponent(search.slice(1).replaceAll('+', ' '));
    for await (const piece of model.generate({ instruction }, { maxNewTokens: 16 })) response.write(piece);
    response.end('\n');
  } else {
    response.writeHead(404).end('POST /train, GET /progress, GET /ask?...\n');
  }
});
server.listen(Number(port), '127.0.0.1', () => {
  console.log(`listening on http://127.0.0.1:${(server.address() as AddressInfo).port}`);
});

// Ctrl-C or SIGTERM: the step in progress is dropped, the last whole one is kept as a checkpoint.
await new Promise<void>((resolve) => {
  for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => resolve());
});
server.close();
server.closeAllConnections();
const kept = await run?.stop();
console.log(kept ? `after ${kept.steps} steps, kept in ${kept.outputDir}` : 'nothing was trained');
