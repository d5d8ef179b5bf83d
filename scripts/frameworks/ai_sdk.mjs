// Uses a running server through the Vercel AI SDK's openai-compatible provider: a structured object and a stream.
// Exits with 1 at the first answer that is not as expected.
//
//     node ai_sdk.mjs http://127.0.0.1:8080/v1
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, Output, streamText } from 'ai';
import { z } from 'zod';

const [baseURL] = process.argv.slice(2);
const model = createOpenAICompatible({ name: 'hone', baseURL, supportsStructuredOutputs: true, includeUsage: true })('SmolLM2-135M-Instruct');

function expect(what, holds, got) {
  if (!holds) {
    console.error(`FAIL ${what}: ${JSON.stringify(got)}`);
    process.exit(1);
  }
  console.log(`ok   ${what}`);
}

const person = z.object({ name: z.string().max(20), age: z.number().int().min(0).max(150), likes: z.enum(['tea', 'coffee']) }).strict();
const prompt = 'Anna is 31 years old and likes tea. Extract the person.';
const structured = await generateText({ model, prompt, temperature: 0, maxOutputTokens: 80, maxRetries: 0, output: Output.object({ schema: person }) });
expect('ai sdk: an object of the schema', person.safeParse(structured.output).success, structured.output);

const story = { model, prompt: 'Tell me about rivers.', temperature: 0, maxOutputTokens: 16, maxRetries: 0 };
const whole = await generateText(story);
const stream = streamText(story);
let text = '';
for await (const part of stream.textStream) text += part;
expect('ai sdk: a stream gives the same text', text === whole.text && text !== '', [text, whole.text]);
expect('ai sdk: with its usage', (await stream.usage).outputTokens === 16, await stream.usage);
expect('ai sdk: and a reason to finish', (await stream.finishReason) === 'length', await stream.finishReason);
