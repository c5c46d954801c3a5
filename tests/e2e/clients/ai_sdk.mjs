// Vercel's AI SDK with its two providers for OpenAI's API: see jobs.mjs.

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, jsonSchema, streamText, tool } from "ai";

import { serve, twentyTimes } from "./jobs.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false;

const LOOK = tool({ inputSchema: jsonSchema({ type: "object", properties: {} }) });

function openaiOf(job) {
  return createOpenAI({ baseURL: `${job.base_url}/v1`, apiKey: job.key });
}

// The provider for everybody who speaks OpenAI's API; it asks for usage only where it is told to.
function compatibleOf(job) {
  return createOpenAICompatible({
    name: "tallygate",
    baseURL: `${job.base_url}/v1`,
    apiKey: job.key,
    includeUsage: job.include_usage ?? false,
  });
}

function ask(model, more = {}) {
  return { model, prompt: "hi", maxOutputTokens: 50, maxRetries: 0, ...more };
}

// An error in a stream is a part of it and not thrown; here it is.
async function gather(options) {
  let failure = null;
  const answer = streamText({ ...options, onError: ({ error }) => (failure = error) });
  let text = "";
  for await (const piece of answer.textStream) text += piece;
  if (failure !== null) throw failure;
  return { text, usage: await answer.usage };
}

async function generate(options) {
  const answer = await generateText(options);
  return { text: answer.text, usage: answer.usage, calls: answer.toolCalls };
}

const cases = {
  chat: (job) => generate(ask(openaiOf(job).chat(job.model))),
  compatible_chat: (job) => generate(ask(compatibleOf(job)(job.model))),
  stream: (job) => gather(ask(openaiOf(job).chat(job.model))),
  compatible_stream: (job) => gather(ask(compatibleOf(job)(job.model))),
  tools: (job) => generate(ask(openaiOf(job).chat(job.model), { tools: { look: LOOK } })),
  responses: (job) => generate(ask(openaiOf(job).responses(job.model))),
  streamed_responses: (job) => gather(ask(openaiOf(job).responses(job.model))),
  retried: (job) => generate(ask(openaiOf(job).chat(job.model), { maxRetries: 2 })),

  async embeddings(job) {
    const model = openaiOf(job).embedding(job.model);
    return (await embedMany({ model, values: ["a", "b"], maxRetries: 0 })).embeddings;
  },

  async abort(job) {
    const controller = new AbortController();
    const options = ask(openaiOf(job).chat(job.model), { abortSignal: controller.signal });
    for await (const piece of streamText(options).textStream) {
      controller.abort();
      return piece;
    }
    return null;
  },

  parallel(job) {
    const model = openaiOf(job).chat(job.model);
    return twentyTimes(async () => (await gather(ask(model))).text);
  },
};

await serve(cases, (error) => ({
  class: error.name,
  status: error.statusCode ?? null,
  code: error.data?.error?.code ?? null,
  retryable: error.isRetryable ?? null,
  headers: error.responseHeaders ?? {},
}));
