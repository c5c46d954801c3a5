"""The litellm SDK in a process of its own: see jobs.py."""

import importlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jobs import Job, serve

# It has no types worth the name.
litellm: Any = importlib.import_module("litellm")

MESSAGES = [{"role": "user", "content": "hi"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {}}},
}


def where(job: Job) -> dict[str, Any]:
    """Address, credentials and model as one gives them for an OpenAI-compatible server."""
    return {
        "model": f"openai/{job['model']}",
        "api_base": f"{job['base_url']}/v1",
        "api_key": job["key"],
        "max_retries": 0,
    }


def ask(job: Job, **more: Any) -> Any:
    return litellm.completion(messages=MESSAGES, max_tokens=50, **where(job), **more)


def gather(stream: Any) -> dict[str, Any]:
    text, usage = "", None
    for chunk in stream:
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
        usage = getattr(chunk, "usage", None) or usage
    return {"text": text, "usage": usage and usage.model_dump(mode="json")}


def models(job: Job) -> list[str]:
    return litellm.get_valid_models(
        check_provider_endpoint=True,
        custom_llm_provider="litellm_proxy",
        api_base=job["base_url"],
        api_key=job["key"],
    )


def chat(job: Job) -> dict[str, Any]:
    completion = ask(job)
    message = completion.choices[0].message
    return {"text": message.content, "usage": completion.usage.model_dump(mode="json")}


def stream(job: Job) -> dict[str, Any]:
    options = {"stream_options": job["stream_options"]} if job.get("stream_options") else {}
    return gather(ask(job, stream=True, **options))


def tools(job: Job) -> list[dict[str, Any]]:
    completion = ask(job, tools=[TOOL])
    return [call.model_dump(mode="json") for call in completion.choices[0].message.tool_calls]


def embeddings(job: Job) -> list[list[float]]:
    made = litellm.embedding(input=["a", "b"], **where(job))
    return [item["embedding"] for item in made.data]


def responses(job: Job) -> dict[str, Any]:
    made = litellm.responses(input="hi", max_output_tokens=50, **where(job))
    usage = made.usage.model_dump(mode="json")
    return {"text": made.output[0].content[0].text, "usage": usage}


def streamed_responses(job: Job) -> str:
    events = litellm.responses(input="hi", max_output_tokens=50, stream=True, **where(job))
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


def abort(job: Job) -> str:
    answer = ask(job, stream=True)
    for chunk in answer:
        # Its own stream can't be closed; openai-python's, which is inside, can.
        answer.completion_stream.close()
        return chunk.choices[0].delta.content
    return ""


def parallel(job: Job) -> list[str]:
    def one(_: int) -> str:
        return gather(ask(job, stream=True))["text"]

    with ThreadPoolExecutor(20) as pool:
        return list(pool.map(one, range(20)))


def describe(error: Exception) -> dict[str, Any]:
    body: Any = getattr(error, "body", None) or {}
    return {
        "status": getattr(error, "status_code", None),
        "code": body.get("code"),
        "headers": dict(getattr(error, "litellm_response_headers", None) or {}),
    }


CASES = (
    models,
    chat,
    stream,
    tools,
    embeddings,
    responses,
    streamed_responses,
    abort,
    parallel,
)

if __name__ == "__main__":
    serve({case.__name__: case for case in CASES}, describe)
