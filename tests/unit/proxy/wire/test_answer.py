import msgspec
import pytest

from pricing.usage import Usage
from proxy.wire.answer import CHAT, Answer, read_answer
from proxy.wire.fields import value_of

# As LiteLLM 1.106.2 sent it.
ANSWER = (
    b'{"id":"chatcmpl-f873fa4b","created":1795208696,"model":"demo","object":"chat.completion",'
    b'"choices":[{"finish_reason":"stop","index":0,"message":{"content":"Hello!","role":'
    b'"assistant"}}],"usage":{"completion_tokens":20,"prompt_tokens":10,"total_tokens":30}}'
)


def test_answer_is_read_and_passed_on_as_it_came() -> None:
    assert read_answer(ANSWER, CHAT) == Answer(
        body=ANSWER,
        is_valid=True,
        model="demo",
        usage=Usage(input_tokens=10, output_tokens=20),
        answer_id="chatcmpl-f873fa4b",
    )


def test_providers_cost_is_taken_out_of_the_body() -> None:
    body = ANSWER.replace(b'"total_tokens":30', b'"total_tokens":30,"cost":0.5,"cost_details":{}')
    answer = read_answer(body, CHAT)
    assert answer.usage == Usage(input_tokens=10, output_tokens=20)
    assert msgspec.json.decode(answer.body) == msgspec.json.decode(ANSWER)


def test_usage_that_no_decoder_takes_is_none_and_leaks_nothing() -> None:
    answer = read_answer(b'{"choices":[],"usage":{"cost":1e999,"prompt_tokens":1}}', CHAT)
    assert answer.is_valid
    assert answer.usage is None
    assert msgspec.json.decode(answer.body) == {"choices": [], "usage": None}


@pytest.mark.parametrize("body", [b'{"choices":[{}]}', b'{"choices":[],"model":5,"usage":null}'])
def test_answer_without_model_or_usage_is_valid(body: bytes) -> None:
    assert read_answer(body, CHAT) == Answer(body=body, is_valid=True)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>502</html>",
        b"[]",
        b"null",
        b'{"choices":[NaN]}',
        b'{"\xff":1}',
        b'{"choices":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b"{}",
        b'{"choices":null}',
        b'{"choices":{"0":{}}}',
    ],
)
def test_garbage_is_not_valid(body: bytes) -> None:
    answer = read_answer(body, CHAT)
    assert not answer.is_valid
    assert answer.usage is None


def test_error_in_an_answer_is_no_answer() -> None:
    body = b'{"error":{"message":"no","code":"500"},"choices":[]}'
    assert read_answer(body, CHAT) == Answer(body=body, is_valid=False, error=body)
    assert read_answer(b'{"error":null,"choices":[]}', CHAT).is_valid


def test_a_member_that_is_absent_has_no_value() -> None:
    assert value_of(None) is None
    assert value_of(msgspec.Raw(b"1e999")) is None
