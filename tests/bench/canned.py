"""What the upstreams of the benchmark answer, and what they are asked."""

import json

MODEL = "demo"
COST_HEADER = "x-litellm-response-cost"
# Of 10 input and 20 output tokens at the prices below.
COST = "0.000225"
MODEL_INFO = {
    "mode": "chat",
    "input_cost_per_token": 2.5e-06,
    "output_cost_per_token": 1e-05,
    "max_input_tokens": 1_000_000,
    "max_output_tokens": 1024,
}
TEXT = "An answer as long as this one is, so that there is something to carry, and not much of it."
# With what a prompt has that JSON must escape.
_LINE = 'Say "something" to the people who read these figures, and be brief about it, please.\n'

_USAGE = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
_HEAD = {"id": "chatcmpl-8b13d260", "created": 1_700_000_000, "model": MODEL}


def _compact(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def request_body(*, stream: bool = False, size: int = 300) -> bytes:
    """Return a prompt of about so many bytes, as an SDK sends it."""
    lines = -(-size // len(_LINE))
    text = (_LINE * lines)[: max(1, size - 100)]
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": text},
    ]
    body: dict[str, object] = {"model": MODEL, "messages": messages}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return _compact(body)


def models() -> bytes:
    """Return LiteLLM's /model/info."""
    row = {"model_name": MODEL, "litellm_params": {"model": MODEL}, "model_info": MODEL_INFO}
    return _compact({"data": [row]})


def answer() -> bytes:
    """Return a whole answer."""
    message = {"role": "assistant", "content": TEXT}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return _compact({**_HEAD, "object": "chat.completion", "choices": [choice], "usage": _USAGE})


def content_event() -> bytes:
    """Return one event of a stream: a token."""
    return _event([{"index": 0, "delta": {"content": " word"}, "finish_reason": None}])


def closing_events() -> bytes:
    """Return the end of a stream: why it ended, what it used and cost, and that it is complete."""
    finish = _event([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    usage = _event([], usage={**_USAGE, "cost": float(COST)})
    return finish + usage + b"data: [DONE]\n\n"


def _event(choices: list[dict[str, object]], **more: object) -> bytes:
    document = {**_HEAD, "object": "chat.completion.chunk", "choices": choices, **more}
    return b"data: " + _compact(document) + b"\n\n"
