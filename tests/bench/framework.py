"""uvicorn and Starlette alone: an application of one route that answers by itself.

`python -m tests.bench.framework PORT`. What anything that is built on the two begins with.
"""

import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.bench import canned

_ANSWER = canned.answer()


async def _complete(request: Request) -> Response:
    await request.body()
    headers = {canned.COST_HEADER: canned.COST}
    return Response(_ANSWER, media_type="application/json", headers=headers)


if __name__ == "__main__":
    uvicorn.run(
        Starlette(routes=[Route("/v1/chat/completions", _complete, methods=["POST"])]),
        port=int(sys.argv[1]),
        loop="uvloop",
        http="httptools",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_level="error",
        backlog=2048,
        timeout_keep_alive=75,
    )
