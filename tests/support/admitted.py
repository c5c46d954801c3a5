"""Admitted requests without a database: for what works on a call and an exchange alone."""

import asyncio
import time
from typing import Any, cast

from pricing.price_book import parse_price_book
from pricing.rating import parse_model_prices
from proxy.accounts import Principal
from proxy.admission import Admitted
from proxy.call import Call
from proxy.catalog import Model
from proxy.endpoints import ENDPOINTS
from proxy.exchange import Exchange, Message, Scope
from proxy.ids import uuid7
from proxy.price_books import PublishedBook
from proxy.repeats import Repeat
from proxy.wire.request import Request

# 1 and 10 dollars a million tokens.
PRICES = {"input_cost_per_token": 1e-06, "output_cost_per_token": 1e-05}
NANOS_PER_CREDIT = 1_000_000


class Client:
    """The other side of an exchange; `sent` is what it was sent, in its order."""

    def __init__(self, *headers: tuple[bytes, bytes]) -> None:
        self.sent: list[Message] = []
        self._headers = list(headers)
        self._is_gone = asyncio.Event()

    def exchange(self) -> Exchange:
        """Begin a request of this client's."""
        scope: Scope = {"type": "http", "headers": self._headers}
        return Exchange(scope, self._receive, self.send)

    def body(self) -> bytes:
        """All that came of the answer's body."""
        return b"".join([message.get("body", b"") for message in self.sent])

    def types(self) -> list[str]:
        """What kinds of messages came."""
        return [message["type"].removeprefix("http.response.") for message in self.sent]

    async def send(self, message: Message) -> None:
        """Take what the exchange sends."""
        self.sent.append(message)

    async def _receive(self) -> Message:
        await self._is_gone.wait()
        return {"type": "http.disconnect"}


def make_call(
    client: Client,
    *,
    prices: dict[str, Any] | None = None,
    rule: dict[str, Any] | None = None,
) -> Call:
    """Make a streamed chat completion with a hold: 40 bytes of a prompt, sold at double its cost.

    `prices` are LiteLLM's, `rule` is the price book's.
    """
    exchange = client.exchange()
    book = parse_price_book({"default": rule or {"kind": "markup", "factor": "2.0"}})
    principal = Principal(
        account_id=uuid7(),
        key_id=uuid7(),
        tier="default",
        version=1,
        allowed_models=None,
        key_status="active",
        account_status="active",
        expires_at=None,
        is_expired=False,
        replay_retries=True,
    )
    admitted = Admitted(
        request_id=exchange.request_id,
        principal=principal,
        endpoint=ENDPOINTS["/v1/chat/completions"],
        request=Request(fields={}, model="priced", prompt_bytes=40, stream=True),
        model=Model(
            name="priced",
            prices=parse_model_prices(PRICES if prices is None else prices),
            max_input_tokens=None,
            max_output_tokens=None,
            mode="chat",
            provider="openai",
        ),
        rule=book.select(str(principal.account_id), principal.tier, "priced"),
        published=PublishedBook(1, book, NANOS_PER_CREDIT),
        provider_key=None,
        output_limit=None,
        headers={"x-ratelimit-limit-requests": "10"},
    )
    # Nothing of it is ever asked to come again, so it has no store.
    repeat = Repeat(store=cast("Any", None))
    return Call(exchange=exchange, admitted=admitted, repeat=repeat, started=time.monotonic())
