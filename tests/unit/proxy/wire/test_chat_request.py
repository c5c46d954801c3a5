from typing import Any

import msgspec
import pytest

from pricing.usage import MAX_TOKENS
from proxy.errors import InvalidRequestError
from proxy.wire.body import MAX_DEPTH, MAX_NODES
from proxy.wire.chat_request import OUTPUT_LIMITS, parse_chat_request
from proxy.wire.request import upstream_body

MESSAGES = [{"role": "user", "content": "Hi"}]


def body(**members: object) -> bytes:
    return msgspec.json.encode({"model": "demo", "messages": MESSAGES, **members})


def sent(request_body: bytes, output_limit: int | None = None) -> dict[str, Any]:
    request = parse_chat_request(request_body)
    forwarded = upstream_body(
        request,
        fields=request.fields,
        output_limit=output_limit,
        api_key=None,
        output_limits=OUTPUT_LIMITS,
        reports_usage=True,
    )
    return msgspec.json.decode(forwarded, type=dict[str, Any])


def test_plain_request_is_read() -> None:
    document = body()
    request = parse_chat_request(document)
    assert request.model == "demo"
    assert request.stream is False
    assert request.output_limit is None
    assert request.n == 1
    assert request.include_usage is False
    assert request.prompt_bytes == len(document)
    assert (request.images, request.audio_clips, request.files) == (0, 0, 0)
    assert request.prediction_bytes == 0
    assert (request.has_audio, request.has_images) == (False, False)
    assert set(request.fields) == {"model", "messages"}


def test_what_decides_about_money_is_read() -> None:
    request = parse_chat_request(
        body(
            stream=True,
            n=3,
            max_tokens=100,
            max_completion_tokens=70,
            stream_options={"include_usage": True},
            modalities=["text", "audio"],
            prediction={"type": "content", "content": "abc"},
        )
    )
    assert request.stream
    assert request.n == 3
    assert request.output_limit == 70
    assert request.include_usage
    assert request.has_audio
    assert request.prediction_bytes == len(b'{"type":"content","content":"abc"}')


def test_null_means_absent() -> None:
    names = ("stream", "n", "max_tokens", "stream_options", "modalities", "prediction")
    request = parse_chat_request(body(**dict.fromkeys(names)))
    assert not request.stream
    assert request.n == 1
    assert request.output_limit is None
    assert request.prediction_bytes == 0


@pytest.mark.parametrize("asked", [False, None, "true", 1])
def test_usage_is_asked_for_by_true_only(asked: object) -> None:
    request = parse_chat_request(body(stream=True, stream_options={"include_usage": asked}))
    assert not request.include_usage


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"{",
        b"nope",
        b'{"model":"demo","messages":[{"role":"user","content":NaN}]}',
        b'{"model":"demo","messages":[{"role":"user","content":Infinity}]}',
        b'{"model":"demo","messages":[{"role":"user","content":"\xff"}]}',
        b'{"model":"demo","messages":[{"role":"user","content":"\\ud800 lone"}]}',
        b'{"model":"demo","messages":[{"role":"user","content":"\\udc00 lone"}]}',
        b'{"model":"demo","\xff":1}',
        b'{"model":"demo",}',
        b'{"model":"demo"} {}',
        b"\xef\xbb\xbf{}",
    ],
)
def test_what_is_no_json_is_refused(document: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="not valid JSON"):
        parse_chat_request(document)


@pytest.mark.parametrize("document", [b"[]", b"null", b'"x"', b"1"])
def test_json_that_is_no_object_is_refused(document: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="must be a JSON object"):
        parse_chat_request(document)


@pytest.mark.parametrize(
    "name, value",
    [
        ("model", None),
        ("model", ""),
        ("model", 5),
        ("model", ["demo"]),
        ("model", "m" * 257),
        ("model", "demo,other"),  # LiteLLM would call both
        ("stream", "true"),
        ("stream", 1),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", "100"),
        ("max_tokens", MAX_TOKENS + 1),
        ("max_tokens", 10**30),
        ("max_completion_tokens", 0),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("n", [1]),
        ("messages", None),
        ("messages", []),
        ("messages", {}),
        ("messages", "Hi"),
        ("messages", ["Hi"]),
        ("messages", [MESSAGES]),
        ("stream_options", []),
        ("stream_options", "include_usage"),
        ("modalities", "audio"),
        ("modalities", [1]),
    ],
)
def test_parameter_of_a_wrong_kind_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        parse_chat_request(body(**{name: value}))
    assert refused.value.param == name
    assert name in refused.value.message


@pytest.mark.parametrize("name", ["model", "messages"])
def test_missing_parameter_is_refused_by_name(name: str) -> None:
    members = {"model": "demo", "messages": MESSAGES}
    del members[name]
    with pytest.raises(InvalidRequestError) as refused:
        parse_chat_request(msgspec.json.encode(members))
    assert refused.value.param == name


def nested(levels: int) -> bytes:
    return b'{"x":' * levels + b"1" + b"}" * levels


@pytest.mark.parametrize("levels", [MAX_DEPTH, 2000, 200_000])
def test_body_that_is_nested_too_deep_is_refused(levels: int) -> None:
    document = body()[:-1] + b',"x":' + nested(levels) + b"}"
    with pytest.raises(InvalidRequestError, match="nested too deep"):
        parse_chat_request(document)


def test_depth_counts_levels_and_not_brackets() -> None:
    deep = body()[:-1] + b',"x":' + nested(MAX_DEPTH - 1) + b"}"
    assert parse_chat_request(deep).model == "demo"
    wide: list[object] = [["x"]] * 300
    request = parse_chat_request(body(x=[*wide, "[{" * 300, '\\"[', "\\", "]}" * 9, "\n"]))
    assert request.model == "demo"


def test_body_of_very_many_objects_is_refused() -> None:
    many: list[list[str]] = [[]] * (MAX_NODES + 1)
    with pytest.raises(InvalidRequestError, match="too many objects"):
        parse_chat_request(body(x=many))
    assert parse_chat_request(body(x="[{" * MAX_NODES)).model == "demo"


def test_last_of_several_members_of_one_name_counts_and_is_sent_alone() -> None:
    document = b'{"model":"a","n":1,"messages":[{}],"mod\\u0065l":"b","n":2}'
    request = parse_chat_request(document)
    assert (request.model, request.n) == ("b", 2)
    forwarded = upstream_body(
        request,
        fields=request.fields,
        output_limit=None,
        api_key=None,
        output_limits=OUTPUT_LIMITS,
        reports_usage=True,
    )
    assert forwarded.count(b'"model"') == forwarded.count(b'"n"') == 1
    assert msgspec.json.decode(forwarded)["model"] == "b"


def test_unread_members_are_sent_as_they_came() -> None:
    document = b'{"model":"demo","messages":[{"role":"user", "content":"\\u00e9"}],"seed":1.50}'
    request = parse_chat_request(document)
    forwarded = upstream_body(
        request,
        fields=request.fields,
        output_limit=None,
        api_key=None,
        output_limits=OUTPUT_LIMITS,
        reports_usage=True,
    )
    assert b'[{"role":"user", "content":"\\u00e9"}]' in forwarded
    assert b"1.50" in forwarded


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False, "include_obfuscation": 1}])
def test_stream_always_asks_for_its_usage(options: dict[str, Any] | None) -> None:
    members = {} if options is None else {"stream_options": options}
    kept = {**(options or {}), "include_usage": True}
    assert sent(body(stream=True, **members))["stream_options"] == kept


def test_answer_that_is_not_streamed_keeps_its_options() -> None:
    assert "stream_options" not in sent(body())
    assert sent(body(stream_options={"x": 1}))["stream_options"] == {"x": 1}


@pytest.mark.parametrize(
    "limits, clamped",
    [
        ({}, {"max_tokens": 9}),
        ({"max_tokens": None}, {"max_tokens": 9}),
        ({"max_completion_tokens": 20}, {"max_completion_tokens": 9}),
        (
            {"max_tokens": 20, "max_completion_tokens": 30},
            {"max_tokens": 9, "max_completion_tokens": 9},
        ),
    ],
)
def test_clamp_stands_where_the_client_has_its_limit(
    limits: dict[str, Any], clamped: dict[str, int]
) -> None:
    forwarded = sent(body(**limits), output_limit=9)
    assert {name: forwarded[name] for name in forwarded if name.startswith("max_")} == clamped


def test_customers_key_is_added_and_members_that_may_not_pass_are_not_sent() -> None:
    request = parse_chat_request(body(tags=["x"]))
    fields = {name: value for name, value in request.fields.items() if name != "tags"}
    forwarded = upstream_body(
        request,
        fields=fields,
        output_limit=None,
        api_key="sk-theirs",
        output_limits=OUTPUT_LIMITS,
        reports_usage=True,
    )
    assert msgspec.json.decode(forwarded) == {
        "model": "demo",
        "messages": MESSAGES,
        "api_key": "sk-theirs",
        "disable_fallbacks": True,
    }
