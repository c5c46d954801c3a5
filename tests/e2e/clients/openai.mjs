// openai-node: see jobs.mjs.

import OpenAI from "openai";

import { serve, twentyTimes } from "./jobs.mjs";

const MESSAGES = [{ role: "user", content: "hi" }];
const TOOL = {
  type: "function",
  function: { name: "look", parameters: { type: "object", properties: {} } },
};

let attempts = 0;

function clientOf(job) {
  attempts = 0;
  return new OpenAI({
    baseURL: `${job.base_url}/v1`,
    apiKey: job.key,
    maxRetries: job.retries ?? 0,
    timeout: job.timeout ?? 30_000,
    fetch: (...request) => {
      attempts += 1;
      return fetch(...request);
    },
  });
}

function ask(job, more = {}) {
  return { model: job.model, messages: MESSAGES, max_tokens: 50, ...more };
}

async function gather(stream) {
  let text = "";
  let usage = null;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  return { text, usage };
}

const cases = {
  async models(job) {
    const found = [];
    for await (const model of clientOf(job).models.list()) found.push(model.id);
    return found;
  },

  async chat(job) {
    const completion = await clientOf(job).chat.completions.create(ask(job));
    return { text: completion.choices[0].message.content, usage: completion.usage };
  },

  async stream(job) {
    const stream = await clientOf(job).chat.completions.create(
      ask(job, { stream: true, stream_options: job.stream_options ?? undefined }),
    );
    return gather(stream);
  },

  async tools(job) {
    const completion = await clientOf(job).chat.completions.create(ask(job, { tools: [TOOL] }));
    return completion.choices[0].message.tool_calls;
  },

  // Its helper puts a streamed call together from its pieces.
  async streamed_tools(job) {
    const runner = clientOf(job).chat.completions.stream(ask(job, { tools: [TOOL] }));
    return (await runner.finalChatCompletion()).choices[0].message.tool_calls;
  },

  // It asks for base64 on its own and decodes it, whatever comes.
  async embeddings(job) {
    const made = await clientOf(job).embeddings.create({ model: job.model, input: ["a", "b"] });
    return made.data.map((item) => item.embedding);
  },

  async responses(job) {
    const client = clientOf(job);
    const made = await client.responses.create({
      model: job.model,
      input: "hi",
      max_output_tokens: 50,
    });
    const found = await client.responses.retrieve(made.id);
    await client.responses.delete(made.id);
    const same = found.id === made.id && found.output_text === made.output_text;
    return { text: made.output_text, usage: made.usage, found: same };
  },

  async streamed_responses(job) {
    const stream = await clientOf(job).responses.create({
      model: job.model,
      input: "hi",
      max_output_tokens: 50,
      stream: true,
    });
    let text = "";
    let last;
    for await (const event of stream) {
      if (event.type === "response.output_text.delta") text += event.delta;
      last = event;
    }
    return { text, last: last.type, usage: last.response.usage };
  },

  async abort(job) {
    const stream = await clientOf(job).chat.completions.create(ask(job, { stream: true }));
    for await (const chunk of stream) {
      stream.controller.abort();
      return chunk.choices[0].delta.content;
    }
    return null;
  },

  parallel(job) {
    const client = clientOf(job);
    return twentyTimes(async () => {
      const stream = await client.chat.completions.create(ask(job, { stream: true }));
      return (await gather(stream)).text;
    });
  },
};

await serve(cases, (error) => ({
  status: error.status ?? null,
  code: error.code ?? null,
  headers: error.headers ? Object.fromEntries(error.headers) : {},
  attempts,
}));
