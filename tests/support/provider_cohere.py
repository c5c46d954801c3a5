"""Cohere's rerank, as the fake provider serves it."""

from typing import Any

from aiohttp import web

from tests.support.provider_reply import Received, Reply
from tests.support.provider_wire import send_json

DOCUMENTS_A_UNIT = 100


async def rerank(request: web.Request, received: Received, reply: Reply) -> web.StreamResponse:
    """Answer /v2/rerank; a search unit is a query with up to a hundred documents."""
    asked = received.json()
    documents: list[Any] = asked["documents"]
    count = min(int(asked.get("top_n") or len(documents)), len(documents))
    meta: dict[str, Any] = {"api_version": {"version": "2"}}
    if reply.usage is None:
        meta["billed_units"] = {"search_units": -(-len(documents) // DOCUMENTS_A_UNIT)}
    elif reply.usage:
        meta |= reply.usage
    answer = {
        "id": "rerank-1",
        "results": [{"index": n, "relevance_score": 0.9 / (n + 1)} for n in range(count)],
        "meta": meta,
    }
    return await send_json(request, reply, answer)
