"""What a test tells the fake provider, and what the provider saw."""

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

WAIT_S = 30


class Gate:
    """Holds an answer back until the test lets it go; no test needs to sleep.

    The provider stops when `after_chunks` chunks of a stream are out (or, with 0 or a plain
    answer, before the first byte).
    """

    def __init__(self, *, after_chunks: int = 0) -> None:
        self.after_chunks = after_chunks
        self._reached = threading.Event()
        self._open = threading.Event()

    def wait_reached(self) -> None:
        """Wait in the test until the provider stands at the gate."""
        assert self._reached.wait(WAIT_S), "the provider never reached the gate"

    def open(self) -> None:
        """Let the provider go on, now and later."""
        self._open.set()

    async def pass_through(self) -> None:
        """Wait in the provider."""
        self._reached.set()
        # The event is a thread's, set by the test; a loop that waits can be cancelled.
        while not self._open.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the provider answers, whatever the endpoint.

    The tokens are reported as the endpoint names them. `usage` is sent instead, word for word;
    `{}` sends none at all. Anthropic's `prompt_tokens` are those that no cache served.

    A chunk is one event of a stream, of whatever type, or one piece of a binary body.
    `cut_after` ends the connection after so many chunks: with a clean end of the body, or with
    `reset` by closing the socket in the middle; a plain answer is cut in its middle. `error_after`
    sends an error event instead, after which the stream ends, or with `keep_usage_after_error`
    goes on to its usage and its end.
    """

    content: str = "Hello from the provider."
    # Each chunk of the answer carries the whole content, for an answer too large to hold.
    repeat_content: bool = False
    # What a reasoning model thought aloud, before the content.
    thinking: str = ""
    prompt_tokens: int = 10
    completion_tokens: int = 5
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    # Those of the cache_write_tokens that are kept for an hour.
    cache_write_1h_tokens: int = 0
    reasoning_tokens: int = 0
    usage: Mapping[str, Any] | None = None
    # How often a stream says its usage at its end.
    usage_times: int = 1
    model: str | None = None
    finish_reason: str = "stop"
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    raw_body: bytes | None = None
    first_byte_delay_s: float = 0.0
    chunks: int = 3
    chunk_delay_s: float = 0.0
    cut_after: int | None = None
    reset: bool = False
    error_after: int | None = None
    keep_usage_after_error: bool = False
    gate: Gate | None = None
    # How long a transcribed recording is; with it, usage is a duration instead of tokens.
    seconds: float | None = None
    # The bytes of speech, or of an image.
    binary: bytes = b"ID3-binary-of-the-provider" * 40

    def usage_object(self) -> dict[str, Any]:
        """Return the usage as chat reports it; empty for none."""
        if self.usage is not None:
            return dict(self.usage)
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
        if self.cached_tokens:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        if self.reasoning_tokens:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return usage

    def pieces(self) -> list[str]:
        """Return the content as it is streamed, in `chunks` pieces."""
        if self.repeat_content:
            return [self.content] * self.chunks
        size = -(-len(self.content) // self.chunks)
        return [self.content[n * size : (n + 1) * size] for n in range(self.chunks)]


class Part(NamedTuple):
    """One field of a multipart form."""

    name: str
    filename: str | None
    content_type: str | None
    data: bytes


@dataclass
class Received:
    """One request that the provider saw, and how it ended."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    model: str
    method: str = "POST"
    query: str = ""
    # Set when the answer is over: `finished`, or `closed_early` where the caller hung up first.
    ended: threading.Event = field(default_factory=threading.Event)
    finished: bool = False
    closed_early: bool = False

    def json(self) -> dict[str, Any]:
        """Return the body, parsed."""
        return json.loads(self.body)

    def form(self) -> list[Part]:
        """Return the parts of a multipart body."""
        return parts(self.headers, self.body)

    def asked(self) -> dict[str, Any]:
        """Return the fields of the body, JSON or form; of a form, texts, and the last one wins."""
        if is_form(self.headers):
            return {p.name: p.data.decode() for p in self.form() if p.filename is None}
        return self.json()

    def wait_ended(self) -> Self:
        """Wait until the provider is through with it."""
        assert self.ended.wait(WAIT_S), "the provider is still answering"
        return self


def is_form(headers: Mapping[str, str]) -> bool:
    """Whether the body is a multipart form."""
    return headers.get("content-type", "").startswith("multipart/form-data")


def parts(headers: Mapping[str, str], body: bytes) -> list[Part]:
    """Split a multipart body; names and file names are taken as plain quoted texts."""
    boundary = _parameter(headers["content-type"], "boundary")
    assert boundary is not None, "a form without a boundary"
    return list(_parts(body.split(b"--" + boundary.encode())[1:-1]))


def _parts(raw: list[bytes]) -> Iterator[Part]:
    for piece in raw:
        head, _, data = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        lines = (line.partition(":") for line in head.decode().split("\r\n"))
        headers = {name.lower(): text.strip() for name, _, text in lines}
        disposition = headers["content-disposition"]
        yield Part(
            _parameter(disposition, "name") or "",
            _parameter(disposition, "filename"),
            headers.get("content-type"),
            data.removesuffix(b"\r\n"),
        )


def _parameter(header: str, name: str) -> str | None:
    for piece in header.split(";")[1:]:
        key, _, text = piece.strip().partition("=")
        if key.lower() == name:
            return text.strip('"')
    return None
