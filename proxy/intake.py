"""Reading a request: its bounds, what of it may go upstream, and what it is known by."""

import msgspec

from proxy import firewall
from proxy.endpoints import Endpoint
from proxy.exchange import Exchange
from proxy.wire.form import FormReader
from proxy.wire.request import Request


class Asked(msgspec.Struct, frozen=True):
    """A request as it was read: of a JSON body `fields` may go on, of a form `texts`.

    `identity` is the same for the same request, whenever it comes.
    """

    request: Request
    fields: dict[str, msgspec.Raw]
    texts: list[tuple[str, str]]
    identity: bytes

    def close(self) -> None:
        """Give up the files of a form."""
        if self.request.form is not None:
            self.request.form.close()


class Intake:
    """Reads requests of all endpoints, within limits in bytes."""

    def __init__(self, *, max_body_bytes: int, max_upload_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._max_upload_bytes = max_upload_bytes

    async def read(self, exchange: Exchange, endpoint: Endpoint) -> Asked:
        """Read the body; raises InvalidRequestError or RequestTooLargeError for what may not go on.

        The caller closes what it gets.
        """
        if endpoint.parse_form is not None:
            return await self._read_form(exchange, endpoint)
        assert endpoint.parse is not None, endpoint.name  # noqa: S101 - one of the two is given
        body = await exchange.read_body(self._max_body_bytes)
        request = endpoint.parse(body)
        if exchange.header(b"x-tallygate-live-cost") == "true":
            request = msgspec.structs.replace(request, live_cost=True)
        return Asked(request, firewall.check_body(request.fields, endpoint.policy), [], body)

    async def _read_form(self, exchange: Exchange, endpoint: Endpoint) -> Asked:
        assert endpoint.parse_form is not None, endpoint.name  # noqa: S101 - as above
        reader = FormReader(exchange.header(b"content-type"))
        try:
            async for part in exchange.body_parts(self._max_upload_bytes):
                reader.feed(part)
            form = reader.end()
            # Read first: it completes what LiteLLM would complete in another way.
            request = endpoint.parse_form(form)
            return Asked(request, {}, firewall.check_form(form, endpoint.policy), form.digest)
        except BaseException:
            reader.close()
            raise
