"""Structured logs: one JSON object a line, with the request's id and never a secret or a prompt.

What is logged is named field by field at the call; no request body, header or answer is ever
handed to a logger, so there is nothing to redact.
"""

import asyncio
import logging
import sys
import time
from datetime import UTC, datetime

import msgspec

# What every LogRecord has; anything else was passed as `extra` and belongs into the line.
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Renders a record as one line of JSON: ts, level, logger, event and the extra fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Render one line."""
        line: dict[str, object] = {
            "ts": _time(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line.update(
            (name, value)
            for name, value in record.__dict__.items()
            # uvicorn adds its message once more, with colours.
            if name not in _STANDARD and name != "color_message"
        )
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


class RequestLog:
    """The line of each request, written some at a time.

    A line is worth microseconds if it does not go to the kernel alone. What a crash takes with it
    is a fifth of a second of them; the ledger has every request.
    """

    _FLUSH_S = 0.2

    def __init__(self) -> None:
        self._lines: list[tuple[float, dict[str, object]]] = []
        self._is_on = logging.getLogger("tallygate.request").isEnabledFor(logging.INFO)

    def write(self, **fields: object) -> None:
        """Queue a line; from within the event loop."""
        if not self._is_on:
            return
        if not self._lines:
            asyncio.get_running_loop().call_later(self._FLUSH_S, self.flush)
        self._lines.append((time.time(), fields))

    def flush(self) -> None:
        """Write what is queued."""
        lines, self._lines = self._lines, []
        if lines:
            written = [
                _ENCODER.encode({"ts": _time(at), **_HEAD, **fields}) for at, fields in lines
            ]
            sys.stderr.buffer.write(b"\n".join(written) + b"\n")
            sys.stderr.buffer.flush()


_HEAD = {"level": "info", "logger": "tallygate.request", "event": "request"}
_ENCODER = msgspec.json.Encoder()


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


def configure_logging(level: str) -> None:
    """Send every logger of the process to standard error, as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # One line a request is ours to write; httpx would name every URL it asks for.
    for name in ("httpx", "httpcore", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
