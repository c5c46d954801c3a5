"""Every endpoint's plain call."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True)
class Call:
    """A call of an endpoint with nothing special about it; `files` where it is a form."""

    path: str
    body: Mapping[str, Any]
    files: Mapping[str, tuple[str, bytes]] | None = None
    # Where LiteLLM asks the provider as well, by what the request holds.
    provider_paths: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """The model that is asked for, there and at the provider."""
        return self.body["model"]

    def send(
        self,
        client: httpx.Client,
        key: str,
        members: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Send it with more or other members; of a form they are texts."""
        body = {**self.body, **(members or {})}
        sent_headers = {"authorization": f"Bearer {key}", **(headers or {})}
        if self.files is None:
            return client.post(self.path, json=body, headers=sent_headers)
        texts = {name: _text(value) for name, value in body.items()}
        return client.post(self.path, data=texts, files=self.files, headers=sent_headers)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


_SAY = [{"role": "user", "content": "hi"}]
JSON_CALLS = {
    call.path: call
    for call in (
        Call("/v1/chat/completions", {"model": "priced", "messages": _SAY, "max_tokens": 20}),
        Call("/v1/completions", {"model": "instruct", "prompt": "hi", "max_tokens": 20}),
        Call("/v1/responses", {"model": "priced", "input": "hi", "max_output_tokens": 20}),
        Call("/v1/messages", {"model": "claude", "messages": _SAY, "max_tokens": 20}),
        Call("/v1/embeddings", {"model": "embed", "input": ["hi", "there"]}),
        Call("/v1/moderations", {"model": "moderate", "input": "hi"}),
        Call(
            "/v1/rerank",
            {"model": "rerank", "query": "q", "documents": ["a", "b"]},
            provider_paths=("/v2/rerank",),
        ),
        Call("/v1/images/generations", {"model": "image", "prompt": "a cat"}),
        Call("/v1/audio/speech", {"model": "speech", "input": "hello", "voice": "alloy"}),
    )
}
FORM_CALLS = {
    call.path: call
    for call in (
        Call(
            "/v1/images/edits", {"model": "image", "prompt": "x"}, {"image": ("a.png", b"\x89PNG")}
        ),
        Call(
            "/v1/audio/transcriptions",
            {"model": "transcribe-tokens"},
            {"file": ("a.wav", b"RIFF" * 50)},
        ),
    )
}
CALLS = {**JSON_CALLS, **FORM_CALLS}
STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
