"""Streams over sockets of our own: when the first event is there, and who takes nothing."""

import socket
import time
from statistics import median, quantiles
from urllib.parse import urlsplit

import httpx

from tests.bench import canned
from tests.bench.contenders import Contender, Stage
from tests.bench.measure import set_pace
from tests.bench.processes import BenchError, forget_peak, peak_mb, resident_mb
from tests.bench.results import FirstByte, Stalled
from tests.bench.source import EVENT

_TIMEOUT_S = 30
# As large as the streams of the first byte are.
_FEW_EVENTS = 5
_STALLED_STREAMS = 10
_STALLED_EVENTS = 100_000
_STALL_S = 2.0
_END = b"data: [DONE]\n\n"


def first_byte(stage: Stage, contender: Contender, *, count: int, number: int) -> FirstByte:
    """Ask for short streams, one after another on one connection."""
    set_pace(stage.streamed[0], 0, _FEW_EVENTS)
    took: list[float] = []
    request = _request(contender)
    with _connect(contender) as connection:
        for _ in range(count):
            started = time.perf_counter()
            connection.sendall(request)
            came = b""
            while b"\r\n\r\n" not in came or b"data:" not in came:
                came += _more(connection)
            took.append((time.perf_counter() - started) * 1000)
            while not came.endswith(b"0\r\n\r\n"):
                came += _more(connection)
            if _END not in came:
                raise BenchError(f"{contender.name} answers {came[:500]!r}")
    if contender.uses_ledger:
        stage.answered += count
    return FirstByte(
        contender=contender.name,
        round=number,
        streams=count,
        p50_ms=median(took),
        p99_ms=quantiles(took, n=100)[-1],
    )


def stalled(stage: Stage, contender: Contender) -> Stalled:
    """Ask for floods, take nothing for a while, then take it all."""
    source = stage.streamed[0]
    set_pace(source, 0, _STALLED_EVENTS)
    forget_peak(contender.pid)
    before = resident_mb(contender.pid)
    connections = [_connect(contender, buffer=65_536) for _ in range(_STALLED_STREAMS)]
    try:
        for connection in connections:
            connection.sendall(_request(contender))
        time.sleep(_STALL_S)
        sent = int(httpx.get(f"{source.url}/sent", timeout=10, trust_env=False).text)
        grown = peak_mb(contender.pid) - before
        whole = sum(_take(connection) for connection in connections)
    finally:
        for connection in connections:
            connection.close()
    stage.answered += whole
    return Stalled(
        streams=_STALLED_STREAMS,
        seconds=_STALL_S,
        stream_mb=len(EVENT) * _STALLED_EVENTS / 1e6,
        sent_mb=sent / _STALLED_STREAMS / 1e6,
        grown_mb=grown,
        whole=whole,
    )


def _take(connection: socket.socket) -> bool:
    """Read an answer to its end; whether it is whole."""
    end = b""
    while not end.endswith(b"0\r\n\r\n"):
        end = (end + _more(connection))[-100:]
    return _END in end


def _connect(contender: Contender, buffer: int | None = None) -> socket.socket:
    address = urlsplit(contender.url)
    assert address.hostname is not None
    assert address.port is not None
    connection = socket.socket()
    connection.settimeout(_TIMEOUT_S)
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.connect((address.hostname, address.port))
    return connection


def _request(contender: Contender) -> bytes:
    body = canned.request_body(stream=True)
    headers = {
        "Host": urlsplit(contender.url).netloc,
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **contender.headers,
    }
    lines = "".join(f"{name}: {text}\r\n" for name, text in headers.items())
    return f"POST /v1/chat/completions HTTP/1.1\r\n{lines}\r\n".encode() + body


def _more(connection: socket.socket) -> bytes:
    data = connection.recv(65_536)
    if not data:
        raise BenchError("the connection was closed in the middle of an answer")
    return data
