"""A process that stands in for LiteLLM, and writes down what it answered.

`python -m tests.chaos.standin PORT JOURNAL`. It answers as each prompt's script says. `begun` is in
the journal before an answer's first byte can leave, `sent` after its last one was handed over: what
is billed must have begun, and what was sent must not be forgotten.
"""

import asyncio
import sys
from pathlib import Path
from typing import Any

import msgspec
import uvicorn

from proxy.lifeline import die_with_supervisor
from tests.chaos.journal import Journal
from tests.chaos.script import MODEL, MODEL_INFO, PROMPT_TOKENS, Script, answer_id

Scope = Any

_JSON = [(b"content-type", b"application/json")]
_EVENTS = [(b"content-type", b"text/event-stream")]


class StandIn:
    """LiteLLM's endpoints, as far as the proxy asks for them."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Be called by the server."""
        if scope["type"] != "http":
            return
        body = await _read(receive)
        if scope["path"] in {"/v1/chat/completions", "/chat/completions"}:
            await self._complete(scope, body, send)
        elif scope["path"] == "/model/info":
            row = {"model_name": MODEL, "litellm_params": {"model": f"openai/{MODEL}"}}
            await _respond(
                send, {"data": [{**row, "model_info": {"id": "deployment", **MODEL_INFO}}]}
            )
        elif scope["path"] == "/utils/token_counter":
            await _respond(send, {"total_tokens": PROMPT_TOKENS})
        else:
            await _respond(send, {"status": "ok"})

    async def _complete(self, scope: Scope, body: bytes, send: Any) -> None:
        asked = msgspec.json.decode(body)
        script = msgspec.json.decode(asked["messages"][0]["content"], type=Script)
        call = dict(scope["headers"]).get(b"x-litellm-call-id", b"").decode()
        # The customer's own key is the customer's own bill, and nobody's cost.
        self._journal.write(event="begun", id=call, nonce=script.nonce, cost=script.cost_picos)
        await asyncio.sleep(script.wait_ms / 1000)
        if script.failure == "error":
            await _respond(send, {"error": {"message": "out of order", "code": "500"}}, status=500)
            return
        if asked.get("stream"):
            # Behind a real LiteLLM it is the provider, and that says nothing of cost.
            is_whole = await _stream(script, send, tells_cost=bool(call))
        else:
            is_whole = await _whole(script, send)
        if is_whole:
            self._journal.write(event="sent", id=call, nonce=script.nonce)


async def _read(receive: Any) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


async def _respond(
    send: Any, content: object, *, status: int = 200, headers: Any = (), cut: bool = False
) -> None:
    body = msgspec.json.encode(content)
    length = (b"content-length", b"%d" % len(body))
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [*_JSON, length, *headers],
        }
    )
    await send({"type": "http.response.body", "body": body[: len(body) // 2] if cut else body})


def _head(script: Script) -> dict[str, object]:
    return {"id": answer_id(script.nonce), "created": 1_700_000_000, "model": MODEL}


def _usage(script: Script) -> dict[str, int]:
    total = PROMPT_TOKENS + script.tokens
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": script.tokens,
        "total_tokens": total,
    }


async def _whole(script: Script, send: Any) -> bool:
    message = {"role": "assistant", "content": "word " * script.tokens}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    content = {
        **_head(script),
        "object": "chat.completion",
        "choices": [choice],
        "usage": _usage(script),
    }
    cost = (b"x-litellm-response-cost", repr(script.cost_picos / 10**12).encode())
    is_cut = script.failure == "cut"
    await _respond(send, content, headers=[cost], cut=is_cut)
    return not is_cut


async def _stream(script: Script, send: Any, *, tells_cost: bool) -> bool:
    await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
    for number in range(script.events):
        if script.failure == "cut" and number == script.events // 2:
            await send({"type": "http.response.body", "body": b""})
            return False
        choice = {"index": 0, "delta": {"content": "word "}, "finish_reason": None}
        await _event(send, script, [choice])
        await asyncio.sleep(script.gap_ms / 1000)
    await _event(send, script, [{"index": 0, "delta": {}, "finish_reason": "stop"}])
    cost = {"cost": script.cost_picos / 10**12} if tells_cost else {}
    await _event(send, script, [], usage={**_usage(script), **cost})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
    return True


async def _event(send: Any, script: Script, choices: list[Any], **more: object) -> None:
    document = {**_head(script), "object": "chat.completion.chunk", "choices": choices, **more}
    data = b"data: " + msgspec.json.encode(document) + b"\n\n"
    await send({"type": "http.response.body", "body": data, "more_body": True})


def main(port: int, journal: Path) -> None:
    """Serve until the process is ended."""
    die_with_supervisor()
    uvicorn.run(
        StandIn(Journal(journal)),
        host="127.0.0.1",
        port=port,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
