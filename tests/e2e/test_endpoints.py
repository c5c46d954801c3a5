"""Every endpoint as a customer calls it: the answer is the provider's, and the ledger knows it."""

import json
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Guest
from tests.support.provider import FakeProvider, Reply

JSON_CALLS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "priced", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": "instruct", "prompt": "hi", "max_tokens": 20},
    "/v1/embeddings": {"model": "embed", "input": ["hi", "there"]},
    "/v1/responses": {"model": "priced", "input": "hi", "max_output_tokens": 20},
    "/v1/messages": {
        "model": "claude",
        "max_tokens": 20,
        "messages": [{"role": "user", "content": "hi"}],
    },
    "/v1/moderations": {"model": "moderate", "input": "hi"},
    "/v1/rerank": {"model": "rerank", "query": "q", "documents": ["a", "b"]},
    "/v1/images/generations": {"model": "image", "prompt": "a cat"},
    "/v1/audio/speech": {"model": "speech", "input": "hello", "voice": "alloy"},
}
STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


def send(guest: Guest, path: str, **options: Any) -> httpx.Response:
    with guest.house.service.client(guest.customer.key) as client:
        return client.post(path, **options)


@pytest.mark.parametrize("path", JSON_CALLS)
@pytest.mark.parametrize("version", ["/v1", ""])
def test_endpoint_answers_and_is_charged(guest: Guest, path: str, version: str) -> None:
    answer = send(guest, version + path.removeprefix("/v1"), json=JSON_CALLS[path])
    assert answer.status_code == 200, answer.text
    assert "cost" not in answer.text
    assert not [name for name in answer.headers if "litellm" in name]
    row = guest.usage()
    assert row["endpoint"] == path.removeprefix("/v1/").replace("/", ".")
    assert row["status"] == "billed", row
    posted, reserved = guest.balance()
    assert (posted, reserved) == (1_000_000_000 - row["price"], 0)
    assert (row["price"] == 0) == (path == "/v1/moderations")


@pytest.mark.parametrize("path", STREAMED)
def test_streamed_endpoint_is_charged_as_the_whole_one(guest: Guest, path: str) -> None:
    body = {**JSON_CALLS[path], "stream": True}
    answer = send(guest, path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "cost" not in answer.text
    row = guest.usage()
    assert row["status"] == "billed", row
    assert row["streamed"]
    send(guest, path, json=JSON_CALLS[path])
    assert guest.usage(count=2)["price"] == row["price"]


@pytest.mark.parametrize(
    "path, data, files",
    [
        ("/v1/images/edits", {"model": "image", "prompt": "x"}, {"image": ("a.png", b"\x89PNG")}),
        ("/v1/audio/transcriptions", {"model": "transcribe"}, {"file": ("a.wav", b"RIFF" * 5000)}),
    ],
)
def test_form_is_passed_on_and_charged(
    guest: Guest, provider: FakeProvider, path: str, data: dict[str, str], files: dict[str, Any]
) -> None:
    provider.reply("transcribe", Reply(seconds=7.5))
    answer = send(guest, path, data=data, files=files)
    assert answer.status_code == 200, answer.text
    (content,) = (file[1] for file in files.values())
    assert content in provider.last().body
    row = guest.usage()
    assert row["status"] == "billed", row
    assert row["price"] > 0


def test_transcription_may_be_plain_text(guest: Guest, provider: FakeProvider) -> None:
    provider.reply("transcribe", Reply(seconds=7.5))
    answer = send(
        guest,
        "/v1/audio/transcriptions",
        data={"model": "transcribe", "response_format": "text"},
        files={"file": ("a.wav", b"RIFF" * 5000)},
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text.startswith("Hello")


def test_translations_are_refused_as_litellm_has_none(guest: Guest) -> None:
    answer = send(
        guest,
        "/v1/audio/translations",
        data={"model": "transcribe"},
        files={"file": ("a.wav", b"RIFF" * 50)},
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unsupported_endpoint")
    assert guest.uncharged()


def test_own_response_is_read_continued_and_deleted_and_nobody_elses(
    guest: Guest, house: Any
) -> None:
    first = send(guest, "/v1/responses", json=JSON_CALLS["/v1/responses"]).json()
    other = house.customer()
    path = f"/v1/responses/{first['id']}"
    with house.service.client(guest.customer.key) as client:
        assert client.get(path).json()["id"] == first["id"]
        follow = client.post(
            "/v1/responses",
            json={**JSON_CALLS["/v1/responses"], "previous_response_id": first["id"]},
        )
        assert follow.status_code == 200, follow.text
    with house.service.client(other.customer.key) as client:
        for answer in (
            client.get(path),
            client.delete(path),
            client.post(
                "/v1/responses",
                json={**JSON_CALLS["/v1/responses"], "previous_response_id": first["id"]},
            ),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (
                404,
                "response_not_found",
            )
    with house.service.client(guest.customer.key) as client:
        deleted = client.delete(path)
        assert (deleted.status_code, deleted.json()["id"]) == (200, first["id"])


def test_tokens_of_messages_are_counted_for_free(guest: Guest) -> None:
    body = {k: v for k, v in JSON_CALLS["/v1/messages"].items() if k != "max_tokens"}
    answer = send(guest, "/v1/messages/count_tokens", json=body)
    assert (answer.status_code, list(answer.json())) == (200, ["input_tokens"])
    assert guest.uncharged()


def test_errors_of_messages_are_anthropics(guest: Guest) -> None:
    answer = send(guest, "/v1/messages", json={**JSON_CALLS["/v1/messages"], "model": "nope"})
    error = answer.json()
    assert (answer.status_code, error["type"]) == (404, "error")
    assert error["error"]["type"] == "not_found_error"
    assert answer.headers["request-id"] == error["request_id"]
    models = guest.house.service.client(guest.customer.key)
    with models as client:
        listed = client.get("/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
    assert listed["data"][0]["type"] == "model"
    assert json.dumps(listed["has_more"]) == "false"
