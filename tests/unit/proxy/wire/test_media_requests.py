"""What bounds the cost of pictures, speech and transcriptions."""

import io
from typing import Any

import msgspec
import pytest

from proxy.errors import InvalidRequestError
from proxy.wire.form import Form, FormFile
from proxy.wire.media_requests import (
    parse_image_form,
    parse_image_request,
    parse_sound_form,
    parse_speech_request,
)
from proxy.wire.request import Request


def picture(**members: object) -> Request:
    return parse_image_request(msgspec.json.encode({"model": "m", "prompt": "a cat", **members}))


def speech(**members: object) -> Request:
    return parse_speech_request(msgspec.json.encode({"model": "m", "input": "hello", **members}))


def a_file(name: str, size: int = 3) -> FormFile:
    return FormFile(name, "a.bin", "application/octet-stream", io.BytesIO(b"x" * size), size)


def edit(*texts: tuple[str, str], files: int = 1) -> Request:
    form = Form([("model", "m"), ("prompt", "x"), *texts], [a_file("image")] * files)
    return parse_image_form(form)


def sound(*texts: tuple[str, str], size: int = 3) -> Request:
    return parse_sound_form(Form([("model", "m"), *texts], [a_file("file", size)]))


def refused_param(parse: Any, *texts: tuple[str, str], **members: object) -> str | None:
    with pytest.raises(InvalidRequestError) as refused:
        parse(*texts, **members)
    return refused.value.param


@pytest.mark.parametrize("n, pictures", [(None, 1), (1, 1), (10, 10), (128, 128)])
def test_every_picture_counts(n: int | None, pictures: int) -> None:
    request = picture(n=n)
    assert (request.n, request.units) == (pictures, {"images": pictures})
    assert request.output_allowance is not None
    assert request.output_allowance >= 6240  # the dearest picture that OpenAI's reference has
    assert request.has_images


@pytest.mark.parametrize(
    "members, param",
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": "2"}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"prompt": None}, "prompt"),
        ({"stream": True}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"model": ""}, "model"),
        ({"model": "a,b"}, "model"),
    ],
)
def test_request_for_pictures_of_a_wrong_kind_is_refused(
    members: dict[str, Any], param: str
) -> None:
    assert refused_param(picture, **members) == param


@pytest.mark.parametrize("text, pictures", [("", 1), ("1", 1), ("007", 7), ("128", 128)])
def test_every_edited_picture_counts(text: str, pictures: int) -> None:
    request = edit(("n", text), files=3)
    assert (request.n, request.units, request.images) == (pictures, {"images": pictures}, 3)


@pytest.mark.parametrize(
    "text", ["0", "-1", "129", "1e2", "1.0", " 1", "+1", "0x1", "\u0663", "\u00b2", "9" * 5000]
)
def test_number_of_edits_that_is_none_is_refused(text: str) -> None:
    assert refused_param(edit, ("n", text)) == "n"


@pytest.mark.parametrize("text", ["true", "True", "TRUE", "1", "yes", "on", "t", " true"])
@pytest.mark.parametrize("parse", [edit, sound])
def test_form_is_not_streamed_in_any_spelling(parse: Any, text: str) -> None:
    assert refused_param(parse, ("stream", text)) == "stream"


@pytest.mark.parametrize("text", ["false", ""])
@pytest.mark.parametrize("parse", [edit, sound])
def test_form_that_is_not_to_be_streamed_passes(parse: Any, text: str) -> None:
    assert not parse(("stream", text)).stream


@pytest.mark.parametrize("parse", [edit, sound])
@pytest.mark.parametrize("name", ["model", "stream"])
def test_text_that_decides_is_refused_when_it_is_given_twice(parse: Any, name: str) -> None:
    assert refused_param(parse, (name, "false"), (name, "false")) == name


@pytest.mark.parametrize("text", ["hello", "h\u00e9llo", "\U0001f600" * 3, "x" * 5000])
def test_speech_is_bounded_by_its_characters(text: str) -> None:
    request = speech(input=text)
    assert request.units == {"input_characters": len(text)}
    # At the slowest speed a character takes a quarter of a second, of 21 tokens.
    assert request.output_allowance is not None
    assert request.output_allowance >= len(text) * 21 / 4
    assert request.stream
    assert request.has_audio


@pytest.mark.parametrize(
    "members, param",
    [
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["hello"]}, "input"),
        ({"stream_format": "sse"}, "stream_format"),
        ({"stream_format": 5}, "stream_format"),
        ({"model": None}, "model"),
    ],
)
def test_request_for_speech_of_a_wrong_kind_is_refused(members: dict[str, Any], param: str) -> None:
    assert refused_param(speech, **members) == param


def test_speech_as_plain_sound_passes() -> None:
    assert speech(stream_format="audio").model == "m"


@pytest.mark.parametrize(
    "size, seconds", [(0, 0), (1, 1), (500, 1), (501, 2), (25 * 1024 * 1024, 52429)]
)
def test_transcription_is_bounded_by_the_bytes_of_its_sound(size: int, seconds: int) -> None:
    request = parse_sound_form(
        Form([("model", "m")], [FormFile("file", "a.wav", "audio/wav", io.BytesIO(), size)])
    )
    assert request.units == {"audio_ms": seconds * 1000}
    assert request.prompt_bytes >= seconds * 50
    assert request.output_allowance == seconds * 10


@pytest.mark.parametrize(
    "files", [[], ["audio"], ["file", "file"], ["file", "image"], ["FILE"], ["file[]"]]
)
def test_transcription_takes_one_file_by_its_name(files: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        parse_sound_form(Form([("model", "m")], [a_file(name) for name in files]))
    assert refused.value.param == "file"


@pytest.mark.parametrize(
    "sent, asked, is_text",
    [
        (None, "json", False),
        ("json", "json", False),
        ("verbose_json", "verbose_json", False),
        # A plain text does not say what it used.
        ("text", "json", True),
        ("srt", "srt", True),
        ("vtt", "vtt", True),
    ],
)
def test_transcription_is_asked_for_in_a_format_that_says_what_it_used(
    sent: str | None,
    asked: str,
    is_text: bool,  # noqa: FBT001
) -> None:
    request = sound(*([] if sent is None else [("response_format", sent)]))
    assert request.form is not None
    assert request.form.text("response_format") == asked
    assert request.is_text == is_text
