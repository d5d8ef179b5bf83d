// Uses a running server with OpenAI's SDK for Node, as its users do: models, chats, a file, a job with its events and
// checkpoints, a batch, the tuned model. Exits with 1 at the first answer that is not as expected.
//
//     node openai_client.mjs http://127.0.0.1:8080/v1 train.jsonl
import fs from 'node:fs';
import OpenAI, { toFile } from 'openai';

const [baseURL, training] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: 'any', maxRetries: 0, timeout: 120_000 });
const model = 'SmolLM2-135M-Instruct';
const say = (text, rest) => ({ model, messages: [{ role: 'user', content: text }], temperature: 0, max_completion_tokens: 8, ...rest });

function expect(what, holds, got) {
  if (!holds) {
    console.error(`FAIL ${what}: ${JSON.stringify(got)}`);
    process.exit(1);
  }
  console.log(`ok   ${what}`);
}

async function all(pages) {
  const list = [];
  for await (const item of pages) list.push(item);
  return list;
}

const refused = (promise) => promise.then(() => undefined, (error) => error);
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

expect('models: the base model is listed', (await all(client.models.list())).some((m) => m.id === model));
expect('models: and found by name', (await client.models.retrieve(model)).id === model);

const chat = await client.chat.completions.create(say('Say hello.'));
const text = chat.choices[0].message.content;
expect('chat: text and usage', text && chat.usage.total_tokens === chat.usage.prompt_tokens + chat.usage.completion_tokens, chat);

const runner = client.chat.completions.stream(say('Say hello.', { logprobs: true, top_logprobs: 3, stream_options: { include_usage: true } }));
const streamed = await runner.finalChatCompletion();
const tokens = streamed.choices[0].logprobs.content;
expect('stream: same text as without', streamed.choices[0].message.content === text, streamed);
expect('stream: usage, and three alternatives a token', streamed.usage.total_tokens === chat.usage.total_tokens && tokens.every((t) => t.top_logprobs.length === 3), streamed);

const schema = { type: 'object', properties: { drink: { enum: ['tea', 'coffee'] } }, required: ['drink'], additionalProperties: false };
const parsed = await client.chat.completions.parse(
  say('Anna likes tea.', { max_completion_tokens: 40, response_format: { type: 'json_schema', json_schema: { name: 'person', strict: true, schema } } }),
);
expect('json_schema: an object of the schema', ['tea', 'coffee'].includes(JSON.parse(parsed.choices[0].message.content).drink), parsed);

const weather = { type: 'function', function: { name: 'get_weather', parameters: { type: 'object', properties: { city: { enum: ['Paris', 'Rome'] } }, required: ['city'] } } };
const request = say('What is the weather in Paris?', { max_completion_tokens: 60, tools: [weather], tool_choice: 'required' });
const calls = (await client.chat.completions.create(request)).choices[0].message;
expect('tools: a call', calls.tool_calls[0].function.name === 'get_weather' && JSON.parse(calls.tool_calls[0].function.arguments).city, calls);
const streamedCalls = (await client.chat.completions.stream(request).finalChatCompletion()).choices[0].message.tool_calls;
expect('tools: the same calls in a stream', JSON.stringify(streamedCalls.map((c) => c.function.arguments)) === JSON.stringify(calls.tool_calls.map((c) => c.function.arguments)), streamedCalls);
request.messages.push(calls, ...calls.tool_calls.map((c) => ({ role: 'tool', tool_call_id: c.id, content: 'rain' })));
expect('tools: the result is taken', (await client.chat.completions.create({ ...request, tool_choice: 'none' })).choices[0].message.content);

const choice = (await client.chat.completions.create(say('A or B?', { guided_choice: ['A', 'B'], logprobs: true, top_logprobs: 2 }))).choices[0];
const sum = choice.logprobs.content[0].top_logprobs.reduce((s, t) => s + Math.exp(t.logprob), 0);
expect('guided_choice: probabilities sum to 1', Math.abs(sum - 1) < 1e-3, sum);

const vectors = await client.embeddings.create({ model, input: ['a cat', 'the economy'] }); // asks for base64, and decodes it
expect('embeddings: one vector a text', vectors.data.length === 2 && vectors.data[0].embedding.length > 100, vectors.data.length);

const unknown = await refused(client.chat.completions.create({ ...say('x'), model: 'no-such-model' }));
expect('error: an unknown model', unknown instanceof OpenAI.NotFoundError && unknown.code === 'model_not_found' && unknown.param === 'model' && unknown.requestID, unknown);

const file = await client.files.create({ file: fs.createReadStream(training), purpose: 'fine-tune' });
expect('file: processed', (await client.files.waitForProcessing(file.id)).bytes === fs.statSync(training).size, file);
expect('file: the content comes back', (await (await client.files.content(file.id)).text()) === fs.readFileSync(training, 'utf8'));
expect('file: is listed', (await all(client.files.list({ limit: 1 }))).some((f) => f.id === file.id));

async function ended(id) {
  for (;;) {
    const job = await client.fineTuning.jobs.retrieve(id);
    if (['succeeded', 'failed', 'cancelled'].includes(job.status)) return job;
    await sleep(300);
  }
}

const hyperparameters = { n_epochs: 1, batch_size: 4 };
const created = await client.fineTuning.jobs.create({
  model, training_file: file.id, suffix: 'node', seed: 1, metadata: { sdk: 'node' }, method: { type: 'supervised', supervised: { hyperparameters } }, hone: { r: 4 },
});
const job = await ended(created.id);
const events = await all(client.fineTuning.jobs.listEvents(job.id, { limit: 3 }));
expect('job: succeeded', job.status === 'succeeded' && job.trained_tokens > 0 && job.result_files.length >= 1 && job.error === null, [job, events]);
expect('job: events in pages, with metrics', events.length > 3 && events.some((e) => e.type === 'metrics' && e.data.train_loss > 0), events);
expect('job: is listed', (await all(client.fineTuning.jobs.list({ limit: 1 }))).some((j) => j.id === job.id));
const checkpoints = await all(client.fineTuning.jobs.checkpoints.list(job.id, { limit: 1 }));
expect('job: a checkpoint', checkpoints[0].metrics.train_loss > 0, checkpoints);
for (const name of [job.fine_tuned_model, checkpoints[0].fine_tuned_model_checkpoint]) {
  expect(`tuned model: answers as ${name}`, (await client.chat.completions.create({ ...say('Which is a fruit?'), model: name })).model === name);
}
const second = await client.fineTuning.jobs.create({ model, training_file: file.id, hone: { num_train_epochs: 50 } });
await client.fineTuning.jobs.pause(second.id);
await client.fineTuning.jobs.resume(second.id);
await client.fineTuning.jobs.cancel(second.id);
expect('job: paused, resumed, cancelled', (await ended(second.id)).status === 'cancelled');

const lines = [model, job.fine_tuned_model, 'no-such-model'].map((name, i) =>
  JSON.stringify({ custom_id: `r${i}`, method: 'POST', url: '/v1/chat/completions', body: { ...say('Say hello.'), model: name } }),
);
const input = await client.files.create({ file: await toFile(Buffer.from(lines.join('\n')), 'batch.jsonl'), purpose: 'batch' });
let batch = await client.batches.create({ input_file_id: input.id, endpoint: '/v1/chat/completions', completion_window: '24h' });
while (!['completed', 'failed', 'expired', 'cancelled'].includes(batch.status)) {
  await sleep(200);
  batch = await client.batches.retrieve(batch.id);
}
expect('batch: completed, one request failed', batch.status === 'completed' && batch.request_counts.completed === 2 && batch.request_counts.failed === 1, batch);
const answers = (await (await client.files.content(batch.output_file_id)).text()).trim().split('\n').map((line) => JSON.parse(line));
expect('batch: two answers in the output', answers.length === 2 && answers.every((a) => a.response.body.choices.length === 1), answers);
expect('batch: is listed', (await all(client.batches.list({ limit: 1 }))).some((b) => b.id === batch.id));

expect('tuned model: is deleted', (await client.models.delete(job.fine_tuned_model)).deleted);
expect('tuned model: is gone', (await refused(client.models.retrieve(job.fine_tuned_model))) instanceof OpenAI.NotFoundError);
expect('file: is deleted', (await client.files.delete(file.id)).deleted);
