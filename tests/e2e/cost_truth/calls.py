"""How each endpoint is called, and what the ledger and the client have of it afterwards."""

import io
import math
import socket
import struct
import wave
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import httpx
import psycopg
from psycopg.rows import dict_row

from tests.e2e.conftest import House, wait_for
from tests.e2e.cost_truth.case import Case
from tests.support.provider import FakeProvider, Gate
from tests.support.service import Customer

_CHAT = [{"role": "user", "content": "hi"}]
_BODIES: Mapping[str, dict[str, Any]] = {
    "chat.completions": {"messages": _CHAT, "max_tokens": 50},
    "completions": {"prompt": "hi", "max_tokens": 50},
    "responses": {"input": "hi", "max_output_tokens": 50},
    "messages": {"messages": _CHAT, "max_tokens": 50},
    "embeddings": {"input": ["hi"]},
    "moderations": {"input": "hi"},
    "rerank": {"query": "q", "documents": ["a", "b"]},
    "images.generations": {"prompt": "a cat"},
    "images.edits": {"prompt": "a hat"},
    "audio.speech": {"input": "hello", "voice": "alloy"},
    "audio.transcriptions": {},
    "audio.translations": {},
}
_UPLOADS: Mapping[str, tuple[str, str, bytes]] = {
    "images.edits": ("image", "cat.png", b"\x89PNG"),
    # No sound that LiteLLM could measure: the provider's word is all there is.
    "audio.transcriptions": ("file", "speech.wav", b"RIFF" * 500),
    "audio.translations": ("file", "speech.wav", b"RIFF" * 500),
}
# How many events of a stream go by before a client hangs up: LiteLLM passes nothing of a stream
# of Responses on before the first words.
_HANGS_UP_AFTER = {"chat.completions": 2, "completions": 2, "responses": 5, "messages": 4}
_RECEIVE_TIMEOUT_S = 20


class Outcome(NamedTuple):
    """What came of a request: its usage row, and the answer as far as it was read."""

    row: dict[str, Any]
    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Patron:
    """A customer who sends one request after the other, and who looks into the books."""

    house: House
    customer: Customer
    client: httpx.Client
    books: psycopg.Connection[dict[str, Any]]

    @classmethod
    def of(cls, house: House) -> "Patron":
        """Open an account with a thousand dollars; `close` the patron."""
        customer = house.service.new_key(credits="1000000")
        books = psycopg.Connection[dict[str, Any]].connect(
            house.database_url,
            autocommit=True,
            row_factory=dict_row,
        )
        books.execute("SET search_path = tallygate")
        return cls(house, customer, house.service.client(customer.key), books)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()
        self.books.close()

    def rows(self) -> list[dict[str, Any]]:
        """Return the usage rows of requests that have ended, the newest first."""
        return self.books.execute(
            "SELECT * FROM usage WHERE account_id = %s AND status <> 'pending'"
            " ORDER BY request_id DESC",
            (self.customer.account_id,),
        ).fetchall()

    def balance(self) -> tuple[int, int]:
        """Posted and reserved, in nano-USD."""
        row = self.books.execute(
            "SELECT posted, reserved FROM balances WHERE account_id = %s",
            (self.customer.account_id,),
        ).fetchone()
        assert row is not None
        return row["posted"], row["reserved"]

    def carry_out(self, provider: FakeProvider, case: Case) -> Outcome:
        """Send a case's request and wait for its end."""
        for _ in range(case.times - 1):
            self._send(provider, case)
        count = len(self.rows())
        posted, _ = self.balance()
        status, headers, body = self._send(provider, case)
        assert status == case.http_status, body
        wait_for(lambda: len(self.rows()) > count, "the settlement")
        rows = self.rows()
        assert len(rows) == count + 1, "one request, several rows"
        assert self.balance() == (posted - (rows[0]["price"] or 0), 0), "not what the row says"
        return Outcome(rows[0], status, headers, body)

    def _send(self, provider: FakeProvider, case: Case) -> tuple[int, Mapping[str, str], bytes]:
        gate = _gate(case)
        provider.reply(case.called or case.model, replace(case.reply, gate=gate))
        request = self.client.build_request("POST", path_of(case), **_request(case))
        if gate is None:
            answer = self.client.send(request)
            return answer.status_code, answer.headers, answer.content
        try:
            if not case.hangs_up:
                return self._read_up_to(gate, request)
            body = self._hang_up(request, gate, waits_for_bytes=case.streamed)
            if case.hangs_up == "drain":
                wait_for(lambda: self.balance()[1] == 0, "the end of the drain")
            return case.http_status, {}, body
        finally:
            gate.open()

    def _read_up_to(
        self, gate: Gate, request: httpx.Request
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Let the provider go on only when the client has some of the answer."""
        body = b""
        answer = self.client.send(request, stream=True)
        for chunk in answer.iter_raw():
            body += chunk
            if b"data:" in body:
                gate.open()
        answer.close()
        return answer.status_code, answer.headers, body

    def _hang_up(self, request: httpx.Request, gate: Gate, *, waits_for_bytes: bool) -> bytes:
        """Send a request and leave: in the middle of the answer, or before it has begun."""
        lines = [f"{name}: {text}" for name, text in request.headers.items()]
        head = f"POST {request.url.path} HTTP/1.1\r\n" + "\r\n".join(lines) + "\r\n\r\n"
        here = ("127.0.0.1", self.house.service.port)
        received = b""
        with socket.create_connection(here, timeout=_RECEIVE_TIMEOUT_S) as client:
            client.sendall(head.encode() + request.read())
            gate.wait_reached()
            while waits_for_bytes and b"data:" not in received:
                received += client.recv(65536)
        return received


def _gate(case: Case) -> Gate | None:
    """Return where the provider waits for the client; a whole answer that is cut waits nowhere."""
    if case.hangs_up:
        return Gate(after_chunks=_HANGS_UP_AFTER[case.endpoint] if case.streamed else 0)
    broken_after = case.reply.cut_after or case.reply.error_after
    return Gate(after_chunks=broken_after) if case.streamed and broken_after else None


def path_of(case: Case) -> str:
    """Return where an endpoint is."""
    family, _, rest = case.endpoint.partition(".")
    return f"/v1/{family}/{rest}" if rest else f"/v1/{family}"


def wav(seconds: float, *, claims: float | None = None) -> bytes:
    """Return a tone of that length, which LiteLLM measures by what its header `claims`."""
    rate = 8000
    frames = [int(8000 * math.sin(n / 5)) for n in range(int(seconds * rate))]
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(struct.pack(f"<{len(frames)}h", *frames))
    data = file.getvalue()
    if claims is None:
        return data
    # The length of the samples stands in the four bytes before them.
    return data[:40] + struct.pack("<I", int(claims * rate) * 2) + data[44:]


def _request(case: Case) -> dict[str, Any]:
    body = {"model": case.model, **_BODIES[case.endpoint], **case.body}
    if case.streamed:
        body["stream"] = True
    upload = _UPLOADS.get(case.endpoint)
    if upload is None:
        return {"json": body, "headers": dict(case.headers)}
    name, filename, content = upload
    file = (filename, body.pop("file", content))
    return {"data": body, "files": {name: file}, "headers": dict(case.headers)}
