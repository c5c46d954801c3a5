from typing import Any

import msgspec
import pytest

from proxy.errors import InvalidRequestError
from proxy.wire.media import Media, count_media

PNG = "data:image/png;base64,"


def count(*parts: object, **message: object) -> Media:
    messages = [{"role": "user", "content": list(parts), **message}]
    return count_media(msgspec.Raw(msgspec.json.encode(messages)))


def image(url: str, **members: object) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **members}}


def test_text_and_tools_hold_no_media() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    text = {"type": "text", "text": "an image_url, a file://x and data:image/png;base64,AAAA"}
    assert count(text, tool_calls=[call]) == Media()
    assert count(content="data:image/png;base64,AAAA") == Media()
    assert count(content=None) == Media()


def test_pictures_are_counted_and_their_bytes_become_no_tokens() -> None:
    assert count(image("https://example.com/a.png"), image(PNG + "A" * 1000)) == Media(
        images=2, tokenless_bytes=1000
    )
    assert count({"type": "image_url", "image_url": PNG + "AAAA"}) == Media(
        images=1, tokenless_bytes=4
    )


@pytest.mark.parametrize(
    "part",
    [
        image("data:text/plain;base64," + "A" * 1000),
        image("data:image/svg+xml;base64," + "A" * 1000),
        image(PNG + "A" * 1000, format="text/plain"),
        image(PNG + "A" * 1000, format=5),
        {"type": "image_url", "image_url": {"url": 5}},
        {"type": "image_url"},
        {"type": "image", "source": {"type": "base64", "data": "A" * 1000}},
        {"image_url": {"url": "https://example.com"}},
    ],
)
def test_what_only_claims_to_be_a_picture_keeps_its_bytes(part: dict[str, Any]) -> None:
    assert count(part) == Media(images=1)


def test_pictures_in_tool_results_and_in_earlier_answers_count() -> None:
    result = {"type": "tool_result", "content": [image(PNG + "AAAA")]}
    assert count(result, images=[image(PNG + "AAAA")]) == Media(images=2, tokenless_bytes=8)
    assert count(content=image("https://example.com")).images == 1


def test_escaped_letters_hide_nothing() -> None:
    messages = (
        b'[{"content":[{"t\\u0079pe":"\\u0069mage_url","im\\u0061ge_url":{"url":"https://x"}}]}]'
    )
    assert count_media(msgspec.Raw(messages)).images == 1


def test_sound_is_counted_and_a_part_of_its_bytes_bounds_its_tokens() -> None:
    sound = {"type": "input_audio", "input_audio": {"data": "A" * 1601, "format": "mp3"}}
    assert count(sound) == Media(audio_clips=1, tokenless_bytes=1500)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "A" * 100, "format": "text/plain"}},
        {"type": "input_audio", "input_audio": {"data": "A" * 100}},
        {"type": "input_audio", "input_audio": "A" * 100},
        {"type": "audio_url", "audio_url": {"url": "https://example.com/a.mp3"}},
    ],
)
def test_what_only_claims_to_be_sound_keeps_its_bytes(part: dict[str, Any]) -> None:
    assert count(part) == Media(audio_clips=1)


def test_earlier_spoken_answer_counts_as_sound() -> None:
    assert count(audio={"id": "audio_1"}) == Media(audio_clips=1)
    assert count(audio=None) == Media()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,AA"}},
        {"type": "file", "file": {"file_id": "https://example.com/a.pdf"}},
        {"type": "document", "title": "gs://x", "source": {"type": "text", "text": "ftp://x"}},
        {"type": "video_url", "video_url": {"url": "https://example.com/a.mp4"}},
    ],
)
def test_files_are_counted_and_keep_their_bytes(part: dict[str, Any]) -> None:
    assert count(part) == Media(files=1)


@pytest.mark.parametrize(
    "part",
    [
        image("gs://bucket/private.png"),
        image("https://example.com/?gs://bucket/private.png"),
        image(" FILE:///etc/passwd"),
        image("s3://bucket/a.png"),
        {"type": "file", "file": {"file_id": "file-abc123"}},
        {"type": "file", "file": {"file_data": "gs://bucket/a.pdf"}},
        {"type": "document", "source": {"parts": [{"url": "gs://b/a"}]}},
        {"type": "container_upload", "file_id": "file_1"},
    ],
)
def test_what_the_operators_credentials_would_read_is_refused(part: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        count(part)
    assert refused.value.param == "messages"


@pytest.mark.parametrize(
    "part", [{"type": ["image_url"]}, {"type": None}, 5, None, [["x"], {"y": 1}]]
)
def test_parts_of_a_wrong_kind_are_no_media(part: object) -> None:
    assert count(part) == Media()


@pytest.mark.parametrize("messages", [b'[{"content":[1e999]}]', b"[]", b"[[]]", b"[1]", b"{}"])
def test_what_are_no_messages_is_refused(messages: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        count_media(msgspec.Raw(messages))
