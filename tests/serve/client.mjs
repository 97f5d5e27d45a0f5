// OpenAI's JavaScript client, unmodified, against a server and a model: prints what came as JSON.
import OpenAI from "openai";
import { makeParseableResponseFormat } from "openai/lib/parser";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 120_000 });
const messages = [{ role: "user", content: "What is the capital of Spain?" }];
const hello = [{ role: "user", content: "Hello there" }];
const create = (body) => client.chat.completions.create({ model, messages, ...body });
const found = {};

const chat = await create({});
found.chat = chat.choices[0].message.content;
found.reason = chat.choices[0].finish_reason;
found.usage = [chat.usage.prompt_tokens, chat.usage.completion_tokens];

found.stream = "";
found.roles = [];
for await (const chunk of await create({ stream: true, stream_options: { include_usage: true } })) {
  if (chunk.usage) found.usageOfStream = [chunk.usage.prompt_tokens, chunk.usage.completion_tokens];
  if (!chunk.choices.length) continue;
  if (chunk.choices[0].delta.role) found.roles.push(chunk.choices[0].delta.role);
  found.stream += chunk.choices[0].delta.content ?? "";
}

const bias = { logit_bias: { 2048: -100, 2049: -100, 2055: -100 }, repetition_guard: false };
for await (const _ of await create({ stream: true, max_tokens: 4000, ...bias })) break; // closes the stream

found.n = (await create({ messages: hello, n: 3, temperature: 1, max_tokens: 5 })).choices.map((each) => each.index);
found.stop = (await create({ stop: ["Madrid"] })).choices[0].message.content;
const seeded = () => create({ messages: hello, temperature: 2, seed: 5, max_tokens: 20, ...bias });
found.seed = [(await seeded()).choices[0].message.content, (await seeded()).choices[0].message.content];
const likely = await create({ logprobs: true, top_logprobs: 2 });
found.logprobs = likely.choices[0].logprobs.content.map((each) => each.token).join("");

const schema = {
  type: "object", properties: { city: { type: "string" } }, required: ["city"], additionalProperties: false,
};
const format = { type: "json_schema", json_schema: { name: "city", schema, strict: true } };
const parsed = await client.chat.completions.parse({
  model, messages, max_tokens: 200, response_format: makeParseableResponseFormat(format, JSON.parse),
});
found.parsed = parsed.choices[0].message.parsed;

found.completion = (await client.completions.create({ model, prompt: "The capital of", max_tokens: 5 })).choices[0].text;
found.response = (await client.responses.create({ model, input: messages[0].content })).output_text;
found.responseStream = "";
for await (const event of await client.responses.create({ model, input: messages[0].content, stream: true })) {
  if (event.type === "response.output_text.delta") found.responseStream += event.delta;
}
found.models = [];
for await (const each of await client.models.list()) found.models.push(each.id);

found.errors = [];
for (const body of [{ temperature: 3 }, { model: "gpt-4" }, { messages: [], stream: true }]) {
  try {
    await create(body);
  } catch (error) {
    found.errors.push([error.constructor.name, error.status, error.param]);
  }
}
console.log(JSON.stringify(found));
