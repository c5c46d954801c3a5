"""What each endpoint's description has to say, so that none is free or unbounded by accident."""

import io
from typing import Any

import msgspec
import pytest

from proxy.dialect import Dialect
from proxy.endpoints import ENDPOINTS, Endpoint
from proxy.errors import InvalidRequestError
from proxy.wire.form import Form, FormFile
from proxy.wire.request import Request
from tests.support.calls import CALLS, Call

EACH = pytest.mark.parametrize("endpoint", ENDPOINTS.values(), ids=lambda endpoint: endpoint.name)
PLAIN = {**CALLS, "/v1/audio/translations": CALLS["/v1/audio/transcriptions"]}


def parsed(endpoint: Endpoint, call: Call) -> Request:
    if endpoint.parse is not None:
        return endpoint.parse(msgspec.json.encode(call.body))
    assert endpoint.parse_form is not None
    files = [
        FormFile(name, file, "", io.BytesIO(data), len(data))
        for name, (file, data) in (call.files or {}).items()
    ]
    return endpoint.parse_form(Form(list(call.body.items()), files))


def test_every_endpoint_has_a_plain_call_and_every_call_an_endpoint() -> None:
    assert set(ENDPOINTS) == set(PLAIN)


@EACH
def test_path_and_name_say_the_same(endpoint: Endpoint) -> None:
    assert ENDPOINTS[endpoint.path] is endpoint
    assert endpoint.path == "/v1/" + endpoint.name.replace(".", "/")


@EACH
def test_body_is_read_as_json_or_as_a_form(endpoint: Endpoint) -> None:
    assert (endpoint.parse is None) != (endpoint.parse_form is None)
    assert bool(endpoint.policy.files) == (endpoint.parse is None)


@EACH
def test_cost_is_bounded_by_a_limit_or_by_what_is_asked_for(endpoint: Endpoint) -> None:
    request = parsed(endpoint, PLAIN[endpoint.path])
    assert request.model
    assert request.prompt_bytes > 0
    # An answer is as long as the client or we let it be, or as long as the request says.
    assert bool(endpoint.output_limits) == (request.output_allowance is None)
    assert set(endpoint.output_limits) <= endpoint.policy.allowed
    assert request.n == 1
    # Where others' parameters pass, they can but change the tokens of an answer that is limited.
    assert not (endpoint.policy.is_open and request.units)


@EACH
def test_model_is_required_but_for_moderations(endpoint: Endpoint) -> None:
    call = PLAIN[endpoint.path]
    without: Any = {name: value for name, value in call.body.items() if name != "model"}
    bare = Call(call.path, without, call.files)
    if endpoint.name == "moderations":
        assert parsed(endpoint, bare).model == "omni-moderation-latest"
        return
    with pytest.raises(InvalidRequestError) as refused:
        parsed(endpoint, bare)
    assert refused.value.param == "model"


@EACH
def test_plain_call_is_within_the_endpoints_own_reference(endpoint: Endpoint) -> None:
    call = PLAIN[endpoint.path]
    assert set(call.body) <= endpoint.policy.allowed
    assert set(call.files or ()) <= endpoint.policy.files
    assert not endpoint.policy.allowed & endpoint.policy.files
    # What bounds the cost is never among what anybody may make up.
    assert "model" in endpoint.policy.allowed


@EACH
def test_stream_is_metered_where_it_may_be_asked_for(endpoint: Endpoint) -> None:
    streams = "stream" in endpoint.policy.allowed and endpoint.policy.is_open
    plain = type(endpoint.make_meter(parsed(endpoint, PLAIN[endpoint.path]), 1000)).__name__
    assert streams == (plain != "PlainMeter")
    if endpoint.reports_usage:
        assert "stream_options" in endpoint.policy.allowed


def test_only_messages_speak_anthropics() -> None:
    anthropics = [path for path, each in ENDPOINTS.items() if each.dialect is Dialect.ANTHROPIC]
    assert anthropics == ["/v1/messages"]


def test_only_moderations_take_no_key_of_the_customers() -> None:
    refusing = [path for path, each in ENDPOINTS.items() if not each.takes_provider_key]
    assert refusing == ["/v1/moderations"]
