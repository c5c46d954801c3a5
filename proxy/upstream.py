"""The pooled client to LiteLLM.

aiohttp, because a relay over httpx manages a tenth of its throughput. The pool has room for every
request that is under way, so that none waits behind another's.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Mapping

import aiohttp
import msgspec
from multidict import CIMultiDictProxy
from yarl import URL

from proxy.errors import (
    InvalidProviderKeyError,
    InvalidRequestError,
    NotFoundError,
    RequestTooLargeError,
    TallygateError,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamRateLimitError,
    UpstreamTimeoutError,
    UpstreamUnavailableError,
)

log = logging.getLogger(__name__)

# Shorter than the five seconds after which LiteLLM's server closes an idle connection: a request
# sent into a closing one would fail for nothing.
_KEEPALIVE_S = 4.0
_MAX_ERROR_BYTES = 64 * 1024
# More than there are endpoints; the addresses of stored answers are not worth keeping.
_MAX_URLS = 64


# What no error body of JSON is: bytes that are none, no UTF-8, or nested beyond the stack.
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class UpstreamAnswer:
    """LiteLLM's answer from its headers on; `close` it in any case."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers: CIMultiDictProxy[str] = response.headers

    async def read(self, limit: int) -> bytes:
        """Read the whole body; UpstreamProtocolError above `limit` bytes."""
        parts: list[bytes] = []
        size = 0
        async for chunk in self.chunks():
            size += len(chunk)
            if size > limit:
                msg = "The provider's answer was larger than is accepted here."
                raise UpstreamProtocolError(msg)
            parts.append(chunk)
        return b"".join(parts)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives; UpstreamError or UpstreamTimeoutError if it is cut."""
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except TimeoutError as error:
            msg = "The provider stopped sending its answer."
            raise UpstreamTimeoutError(msg) from error
        except (aiohttp.ClientError, OSError) as error:
            log.warning("answer cut", extra={"error": f"{type(error).__name__}: {error}"})
            msg = "The connection to the provider was lost before its answer was complete."
            raise UpstreamError(msg) from error

    def close(self) -> None:
        """Give the connection back if the answer was read to its end, else end it."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


class Upstream:
    """Sends requests to one LiteLLM."""

    def __init__(
        self, url: str, *, connect_timeout_s: float, read_timeout_s: float, max_connections: int
    ) -> None:
        self._base = url.rstrip("/")
        self._urls: dict[str, URL] = {}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=max_connections, keepalive_timeout=_KEEPALIVE_S, ttl_dns_cache=60
            ),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=connect_timeout_s, sock_read=read_timeout_s
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
            read_bufsize=256 * 1024,
        )

    async def post(
        self, path: str, body: bytes | AsyncIterator[bytes], headers: Mapping[str, str]
    ) -> UpstreamAnswer:
        """Send a POST: see `send`. A body that is read as it goes needs its length in a header."""
        return await self.send("POST", path, body, headers)

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | AsyncIterator[bytes] | None,
        headers: Mapping[str, str],
    ) -> UpstreamAnswer:
        """Send a request and wait for the answer's headers.

        Raises UpstreamUnavailableError, UpstreamTimeoutError or UpstreamError; an answer with an
        error status is returned like any other.
        """
        url = self._urls.get(path)
        if url is None:
            url = URL(self._base + path, encoded=True)
            if len(self._urls) < _MAX_URLS:
                self._urls[path] = url
        try:
            response = await self._session.request(
                method, url, data=body, headers=headers, allow_redirects=False
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            msg = "The model service can't be reached. Nothing was charged; try again shortly."
            raise UpstreamUnavailableError(msg, retry_after_s=2) from error
        except TimeoutError as error:
            msg = "The provider did not answer in time. Nothing was charged."
            raise UpstreamTimeoutError(msg) from error
        except (aiohttp.ClientError, OSError) as error:
            msg = "The connection to the model service was lost. Nothing was charged."
            raise UpstreamError(msg) from error
        return UpstreamAnswer(response)

    async def failure(self, answer: UpstreamAnswer, *, is_byok: bool) -> TallygateError:
        """Read an answer whose status is not 200 and say what the customer hears of it."""
        try:
            async with asyncio.timeout(10):
                body = await answer.read(_MAX_ERROR_BYTES)
        except (TallygateError, TimeoutError):
            body = b""
        return explain_failure(answer.status, answer.headers, body, is_byok=is_byok)

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()


def explain_failure(
    status: int, headers: Mapping[str, str], body: bytes, *, is_byok: bool
) -> TallygateError:
    """Turn LiteLLM's error answer into ours.

    Only what the customer can mend is told in the provider's words. A 401 or 403 speaks of a
    credential: of the customer's under BYOK, else of the operator's, which is none of its business.
    """
    message, code, param = _read_error(body)
    error: TallygateError
    match status:
        case 400 | 422:
            error = InvalidRequestError(
                message or "The provider refused the request.",
                code=code or "provider_refused",
                param=param,
            )
        case 401 | 403 if is_byok:
            error = InvalidProviderKeyError("The provider refused the key that you sent for it.")
        case 404 if message is None:
            error = NotFoundError(
                "The model service behind this address does not offer this endpoint.",
                code="unsupported_endpoint",
            )
        case 408 | 504:
            error = UpstreamTimeoutError(
                "The provider did not answer in time. Nothing was charged."
            )
        case 413:
            error = RequestTooLargeError("The provider refused the request as too large.")
        case 429:
            error = UpstreamRateLimitError(
                "The provider is limiting requests to this model. Nothing was charged; try later.",
                retry_after_s=_retry_after(headers),
            )
        case 503:
            error = UpstreamUnavailableError(
                "The model service is not available. Nothing was charged; try again shortly.",
                retry_after_s=_retry_after(headers) or 2,
            )
        case _:
            error = UpstreamError("The provider failed to answer. Nothing was charged.")
    return error


def explain_stream_error(payload: bytes) -> TallygateError:
    """Turn an error that came as an event of a stream into ours, by the status it names."""
    try:
        status = int(msgspec.json.decode(payload)["error"]["code"])
    except (*UNREADABLE, KeyError, TypeError, ValueError):
        status = 500
    explained = explain_failure(status, {}, payload, is_byok=False)
    if isinstance(explained, InvalidRequestError):
        return explained
    msg = "The provider failed before its answer was complete."
    return UpstreamError(msg, code=explained.code)


def _retry_after(headers: Mapping[str, str]) -> int | None:
    for name in ("llm_provider-retry-after", "retry-after"):
        text = headers.get(name, "")
        if text.isascii() and text.isdigit():
            return min(int(text), 3600)
    return None


def _read_error(body: bytes) -> tuple[str | None, str | None, str | None]:
    """Message, code and parameter of an OpenAI-shaped error body, as far as it is one."""
    try:
        error = msgspec.json.decode(body)["error"]
        message, code, param = error.get("message"), error.get("code"), error.get("param")
    except (*UNREADABLE, KeyError, TypeError, AttributeError):
        return None, None, None
    return (
        public_message(message) if isinstance(message, str) else None,
        # LiteLLM repeats the status as a code; that is no code. What is one is kept in the ledger.
        code if isinstance(code, str) and _CODE.fullmatch(code) else None,
        param[:200] if isinstance(param, str) else None,
    )


_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")
_WRAPPING = re.compile(r"^(?:litellm\.\w+:\s*|\w+Exception\s*-\s*|\w+Error:\s*)+")
_ROUTING = re.compile(
    r"[.\s]*(?:Received Model Group=|Available Model Group Fallbacks=|LiteLLM: model group ).*",
    re.DOTALL,
)
_SECRETS = re.compile(r"\b(?:sk|pk|key|AIza)[-_A-Za-z0-9*]{8,}|https?://\S+")


def public_message(text: str) -> str:
    """A provider's error text without LiteLLM's wrapping, its routing, keys and addresses."""
    text = _ROUTING.sub("", _WRAPPING.sub("", text.strip())).strip()
    return _SECRETS.sub("[removed]", _quoted_message(text) or text)[:2000]


def _quoted_message(text: str) -> str | None:
    """The message in a provider's whole body, where LiteLLM put that into its own."""
    try:
        message = msgspec.json.decode(text)["error"]["message"]
    except (*UNREADABLE, KeyError, TypeError):
        return None
    return message if isinstance(message, str) else None
