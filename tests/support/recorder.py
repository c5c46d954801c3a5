"""Record what LiteLLM streams, byte for byte, for the property tests: run it after a new pin.

    .venv/bin/python -m tests.support.recorder

Each recording is `recordings/<endpoint>-<case>.sse`. Times and ids in it are LiteLLM's own.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from proxy.embedded.litellm import LiteLLMChild
from tests.support.litellm import MASTER_KEY, PROVIDER_KEY, litellm_section
from tests.support.provider import FakeProvider, Reply

RECORDINGS = Path(__file__).parent / "recordings"
# Letters of two, three and four bytes, and a text that looks like a stream's own syntax.
TEXT = "H\u00e9llo \u2603 from the \U0001f600 provider.\nTwo lines: data: x\n\n"
THOUGHT = "Let me see \u2026\n"
TOOL_CALLS = tuple(
    {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": arguments}}
    for name, arguments in (("weather", '{"city": "Z\\u00fcrich"}'), ("clock", "{}"))
)
CACHED: dict[str, Any] = {
    "cached_tokens": 1000,
    "cache_write_tokens": 300,
    "cache_write_1h_tokens": 100,
}
# Long enough for LiteLLM to have passed on what came before a break.
PAUSE_S = 0.05


class Endpoint(NamedTuple):
    path: str
    body: Mapping[str, Any]
    # After how many events the provider breaks: in the middle of the text.
    middle: int
    tools: tuple[Mapping[str, Any], ...] = ()
    reply: Mapping[str, Any] = {}


class Case(NamedTuple):
    name: str
    reply: Reply
    body: Mapping[str, Any] = {}


MESSAGES = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object"}
ENDPOINTS = {
    "chat": Endpoint(
        "/v1/chat/completions",
        {"model": "priced", "messages": MESSAGES},
        2,
        ({"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},),
    ),
    "completions": Endpoint("/v1/completions", {"model": "instruct", "prompt": "hi"}, 2),
    "responses": Endpoint(
        "/v1/responses",
        {"model": "priced", "input": "hi"},
        6,
        ({"type": "function", "name": "weather", "parameters": SCHEMA},),
    ),
    "messages": Endpoint(
        "/v1/messages",
        {"model": "claude", "messages": MESSAGES, "max_tokens": 20},
        5,
        ({"name": "weather", "input_schema": SCHEMA},),
        CACHED,
    ),
}
OF_ONE_ENDPOINT = {
    "chat": [
        Case("bridged", Reply(content=TEXT, **CACHED), {"model": "claude"}),
        Case("n2", Reply(content=TEXT), {"n": 2}),
    ],
    "responses": [
        Case("incomplete", Reply(content=TEXT, finish_reason="length")),
        Case("failed", Reply(content=TEXT, finish_reason="error")),
        Case("bridged", Reply(content=TEXT), {"model": "claude"}),
    ],
    "messages": [
        Case("bridged", Reply(content=TEXT), {"model": "priced"}),
    ],
}


def _cases(name: str, endpoint: Endpoint) -> Iterator[Case]:
    text: dict[str, Any] = {"content": TEXT, "chunks": 5, **endpoint.reply}
    slow: dict[str, Any] = {**text, "chunk_delay_s": PAUSE_S}
    unpriced = {"priced": "unpriced"}.get(endpoint.body["model"])
    yield Case("text", Reply(**text))
    yield Case("error", Reply(**slow, error_after=endpoint.middle))
    yield Case("cut", Reply(**slow, cut_after=endpoint.middle))
    yield Case("reset", Reply(**slow, cut_after=endpoint.middle, reset=True))
    yield Case(
        "error-then-usage",
        Reply(**slow, error_after=endpoint.middle, keep_usage_after_error=True),
    )
    yield Case("usage-twice", Reply(**text, usage_times=2))
    yield Case("no-usage", Reply(**text, usage={}))
    yield Case(
        "unpriced", Reply(**text), {"model": unpriced or f"{endpoint.body['model']}-unpriced"}
    )
    if endpoint.tools:
        tools = {"tools": endpoint.tools}
        finish = "stop" if name == "responses" else "tool_calls"
        calls: dict[str, Any] = {"tool_calls": TOOL_CALLS, "finish_reason": finish}
        yield Case("tools", Reply(**text, **calls), tools)
        yield Case("thinking", Reply(**text, thinking=THOUGHT, reasoning_tokens=3))
        yield Case("thinking-tools", Reply(**text, **calls, thinking=THOUGHT), tools)
    yield from OF_ONE_ENDPOINT.get(name, [])


def _record(client: httpx.Client, provider: FakeProvider) -> None:
    for name, endpoint in ENDPOINTS.items():
        for case in _cases(name, endpoint):
            body: dict[str, Any] = {**endpoint.body, **case.body, "stream": True}
            provider.reply(body["model"], case.reply)
            answer = client.post(endpoint.path, json=body)
            answer.raise_for_status()
            (RECORDINGS / f"{name}-{case.name}.sse").write_bytes(answer.content)


def main() -> None:
    RECORDINGS.mkdir(exist_ok=True)
    provider = FakeProvider().start()
    with tempfile.TemporaryDirectory() as directory:
        child = LiteLLMChild(
            litellm_section(provider.url),
            data_dir=Path(directory),
            master_key=MASTER_KEY,
            environ={**os.environ, "PROVIDER_KEY": PROVIDER_KEY},
        )
        headers = {"authorization": f"Bearer {MASTER_KEY}"}
        try:
            with httpx.Client(base_url=child.start(), headers=headers, timeout=60) as client:
                _record(client, provider)
        finally:
            child.stop()
            provider.stop()


if __name__ == "__main__":
    main()
