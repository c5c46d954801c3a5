"""LiteLLM and providers on their bad days: the right error, and the ledger as if nothing was."""

import socket
import threading
from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.e2e.conftest import Guest, House
from tests.support.litellm import MODELS
from tests.support.provider import FakeProvider, Gate, Reply
from tests.support.service import free_port

MESSAGES: Any = [{"role": "user", "content": "hi"}]
# What LiteLLM puts on a whole answer.
COST = {"x-litellm-response-cost": "6e-05"}


@pytest.fixture(scope="module")
def stand_in(make_house: Callable[..., House], provider_server: FakeProvider) -> House:
    """A service whose LiteLLM is the fake provider, so that it can answer what it likes."""
    provider_server.deployments = [
        {"model_name": name, "litellm_params": {"model": f"openai/{name}"}, "model_info": info}
        for name, info in MODELS.items()
    ]
    return make_house(
        litellm_url=provider_server.url.removesuffix("/v1"),
        environ={"TALLYGATE_UPSTREAM__READ_TIMEOUT_S": "1"},
    )


@pytest.fixture
def patron(stand_in: House) -> Guest:
    """A customer of that service."""
    return stand_in.customer()


def assert_void(guest: Guest, code: str) -> None:
    row = guest.usage()
    assert (row["status"], row["error_code"], row["price"]) == ("void", code, None)
    assert guest.uncharged()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "reply, status, code",
    [
        (Reply(status=401), 502, "upstream_error"),
        (Reply(status=403), 502, "upstream_error"),
        (Reply(status=404), 502, "upstream_error"),
        (Reply(status=400), 400, "provider_refused"),
        (
            Reply(status=429, headers={"llm_provider-retry-after": "7"}),
            429,
            "upstream_rate_limited",
        ),
        (Reply(status=500), 502, "upstream_error"),
        (Reply(status=503), 503, "upstream_unavailable"),
        (Reply(status=504), 504, "upstream_timeout"),
        (Reply(status=500, raw_body=b"<html>"), 502, "upstream_error"),
        (Reply(first_byte_delay_s=3), 504, "upstream_timeout"),
    ],
)
def test_failure_of_litellm_is_void(
    patron: Guest,
    provider: FakeProvider,
    reply: Reply,
    status: int,
    code: str,
    stream: bool,  # noqa: FBT001
) -> None:
    provider.reply("priced", reply)
    answer = patron.chat(stream=stream)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    if status == 429:
        assert answer.headers["retry-after"] == "7"
    assert "key" not in answer.text
    assert_void(patron, code)


@pytest.mark.parametrize("raw", [b"", b"<html>", b"{}", b'{"choices":7}', b'{"choices":[]', b"[]"])
def test_garbage_with_status_200_is_not_delivered_and_not_charged(
    patron: Guest, provider: FakeProvider, raw: bytes
) -> None:
    provider.reply("priced", Reply(raw_body=raw, headers=COST))
    answer = patron.chat()
    assert (answer.status_code, answer.json()["error"]["code"]) == (
        502,
        "upstream_invalid_response",
    )
    assert_void(patron, "upstream_invalid_response")


def test_litellm_away_is_503(make_house: Callable[..., House], provider: FakeProvider) -> None:
    del provider
    house = make_house(
        litellm_url=f"http://127.0.0.1:{free_port()}",
        environ={"TALLYGATE_UPSTREAM__CATALOG_REFRESH_S": "1"},
        wait=False,
    )
    guest = house.customer()
    answer = guest.chat()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "upstream_unavailable")
    assert answer.headers["retry-after"]
    assert guest.uncharged()


def test_stream_that_is_cut_ends_with_an_error_event_and_waits_for_review(
    patron: Guest, provider: FakeProvider
) -> None:
    provider.reply("priced", Reply(cut_after=2, reset=True))
    with pytest.raises(openai.APIError):
        list(patron.sdk().chat.completions.create(model="priced", messages=MESSAGES, stream=True))
    row = patron.usage()
    assert (row["status"], row["review_reason"], row["price"]) == (
        "needs_review",
        "stream_cut",
        None,
    )
    assert patron.uncharged()


def test_stream_that_ends_early_without_a_word_is_treated_as_cut(
    patron: Guest, provider: FakeProvider
) -> None:
    provider.reply("priced", Reply(cut_after=2))
    answer = patron.chat(stream=True)
    assert '"error"' in answer.text.rsplit("data: ", 1)[1]
    assert patron.usage()["review_reason"] == "stream_cut"


def test_error_event_in_a_stream_raises_in_the_sdk(patron: Guest, provider: FakeProvider) -> None:
    provider.reply("priced", Reply(error_after=2))
    with pytest.raises(openai.APIError):
        list(patron.sdk().chat.completions.create(model="priced", messages=MESSAGES, stream=True))
    assert patron.usage()["status"] == "needs_review"
    assert patron.uncharged()


def test_error_event_before_anything_else_is_an_error_answer(
    patron: Guest, provider: FakeProvider
) -> None:
    provider.reply("priced", Reply(error_after=0))
    answer = patron.chat(stream=True)
    assert answer.status_code == 502
    assert patron.usage()["status"] == "void"
    assert patron.uncharged()


def test_cut_stream_is_charged_by_estimate_where_the_operator_says_so(
    make_house: Callable[..., House], provider: FakeProvider, stand_in: House
) -> None:
    del stand_in
    house = make_house(
        litellm_url=provider.url.removesuffix("/v1"),
        environ={"TALLYGATE_CHARGE_CUT_STREAMS": "true"},
    )
    guest = house.customer()
    provider.reply("priced", Reply(cut_after=2, reset=True, content="word " * 200))
    guest.chat(stream=True, max_tokens=500)
    row = guest.usage()
    assert (row["status"], row["cost_source"]) == ("billed", "estimated")
    assert 0 < row["price"] < row["hold"]


def test_answer_without_a_reported_cost_is_rated_from_its_usage(
    patron: Guest, provider: FakeProvider
) -> None:
    del provider
    patron.chat()
    row = patron.usage()
    assert (row["status"], row["cost_source"], row["cost_picos"]) == ("billed", "rated", 60_000_000)


def test_providers_strange_texts_do_not_stop_a_settlement(
    patron: Guest, provider: FakeProvider
) -> None:
    provider.reply("priced", Reply(model="nul\x00and" + "x" * 5000))
    assert patron.chat().status_code == 200
    row = patron.usage()
    assert (row["status"], row["model_answered"][:6], len(row["model_answered"])) == (
        "billed",
        "nuland",
        256,
    )


def test_answer_without_usage_or_cost_waits_for_review(
    patron: Guest, provider: FakeProvider
) -> None:
    provider.reply("priced", Reply(usage={}))
    assert patron.chat().status_code == 200
    assert patron.usage()["review_reason"] == "usage_missing"


def test_client_that_hangs_up_is_charged_for_what_was_generated(
    guest: Guest, provider: FakeProvider
) -> None:
    gate = Gate(after_chunks=2)
    provider.reply("priced", Reply(chunks=50, gate=gate, completion_tokens=200))
    with (
        guest.house.service.client(guest.customer.key) as client,
        client.stream(
            "POST",
            "/v1/chat/completions",
            json={"model": "priced", "messages": MESSAGES, "stream": True, "max_tokens": 500},
        ) as answer,
    ):
        next(answer.iter_bytes())
        gate.wait_reached()
    gate.open()
    assert provider.last().wait_ended().finished
    guest.wait_settled()
    row = guest.usage()
    assert (row["status"], row["client_gone"], row["output_tokens"]) == ("billed", True, 200)
    # 10 x 1 + 200 x 10 dollars a million, sold double
    assert row["price"] == 4_020_000


def test_client_that_hangs_up_on_a_whole_answer_is_charged_too(
    guest: Guest, provider: FakeProvider
) -> None:
    gate = Gate()
    provider.reply("priced", Reply(gate=gate))
    service = guest.house.service
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        body = b'{"model":"priced","messages":[{"role":"user","content":"hi"}],"max_tokens":9}'
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer "
            + guest.customer.key.encode()
            + b"\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        gate.wait_reached()
    gate.open()
    guest.wait_settled()
    assert guest.usage()["price"] == 120_000


def test_slow_client_does_not_hold_up_the_others(guest: Guest, provider: FakeProvider) -> None:
    provider.reply("dear", Reply(content="x" * 4_000_000, chunks=100))
    service = guest.house.service
    with socket.create_connection(("127.0.0.1", service.port)) as slow:
        body = b'{"model":"free","stream":true,"messages":[{"role":"user","content":"hi"}]}'
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer "
            + guest.customer.key.encode()
            + b"\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        slow.recv(10)
        threads = [threading.Thread(target=guest.chat) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()


def test_client_that_stalls_counts_as_gone_and_is_charged(
    make_house: Callable[..., House], provider: FakeProvider
) -> None:
    house = make_house(environ={"TALLYGATE_CLIENT_STALL_TIMEOUT_S": "0.5"})
    guest = house.customer()
    # Never the same twice: LiteLLM ends a stream that repeats itself.
    content = "".join(f"{number:07d} " for number in range(1_000_000))
    provider.reply("priced", Reply(content=content, chunks=1000))
    with socket.socket() as stalled:
        # Little room on this side, so that a few megabytes fill what lies between.
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(("127.0.0.1", house.service.port))
        body = b'{"model":"priced","stream":true,"messages":[{"role":"user","content":"hi"}]}'
        stalled.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer "
            + guest.customer.key.encode()
            + b"\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        guest.wait_settled()
    row = guest.usage()
    assert (row["status"], row["client_gone"], row["price"]) == ("billed", True, 120_000), [
        row[name] for name in ("review_reason", "error_code", "duration_ms", "output_tokens")
    ]
