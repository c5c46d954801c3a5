"""Pictures, sound and files in a prompt: chat messages, and the items of other endpoints.

What they cost does not follow from their bytes, so they are counted, and a picture's bytes are
taken off the prompt's. Messages that are plain text stay unread.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import msgspec

from proxy.errors import InvalidRequestError
from proxy.wire.fields import NULL, UNREADABLE, is_null

_IMAGES = frozenset({"image_url", "image", "input_image", "computer_screenshot"})
_SOUNDS = frozenset({"input_audio", "audio", "audio_url"})
_FILES = frozenset({"file", "input_file", "document", "video_url", "video", "input_video"})
# Anthropic's way to run code: the container is paid by the hour, in no usage. And OpenAI's ways to
# name what is stored under the account of whoever owns the provider's key.
_REFUSED = frozenset({"container_upload", "item_reference", "image_generation_call"})

# Members of media that are words for people.
_PROSE = frozenset({"text", "title", "context", "filename", "name"})

_COMPOSITE = (b"[", b"{")
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*)://")
_PRIVATE = re.compile(r"\s*(?:gs|s3)://\S*\s*", re.IGNORECASE)
_PICTURE = re.compile(r"data:image/(?!svg)[a-z0-9.+-]+;base64,", re.IGNORECASE)
_MEDIA_TYPE = re.compile(r"image/(?!svg)[a-z0-9.+-]+", re.IGNORECASE)
_CODEC = re.compile(r"[A-Za-z0-9]{1,16}")

# Speech takes at least 4 kbit/s in any codec, which is 667 characters of base64 a second, and no
# model makes more than 32 tokens of a second: over 20 characters a token.
_AUDIO_CHARACTERS_PER_TOKEN = 16


@dataclass(slots=True)
class Media:
    """How many there are, and the bytes that stand for them but become no tokens.

    `param` is the member of the request that they stand in.
    """

    param: str = "messages"
    images: int = 0
    audio_clips: int = 0
    files: int = 0
    tokenless_bytes: int = 0


class _Message(msgspec.Struct):
    """The members of a message that media may be in; all else of it is skipped."""

    content: msgspec.Raw = NULL
    audio: msgspec.Raw = NULL
    images: msgspec.Raw = NULL


_MESSAGES = msgspec.json.Decoder(list[_Message])


def count_media(messages: msgspec.Raw) -> Media:
    """Count what is in the messages.

    The bytes of a file stay in the prompt's: a text file may become as many tokens as it has.
    Raises InvalidRequestError for what is not served, and where there is not one message, or one
    is no object: LiteLLM would take a list of lists for a batch of requests.
    """
    media = Media()
    try:
        each = _MESSAGES.decode(messages)
        for message in each:
            for member in (message.content, message.images):
                if bytes(memoryview(member)[:1]) in _COMPOSITE:
                    _walk(media, msgspec.json.decode(member))
            if not is_null(message.audio):
                media.audio_clips += 1
    except UNREADABLE:
        each = []
    if not each:
        raise InvalidRequestError(
            "messages must be a list of at least one message.", param="messages"
        )
    return media


def count_parts(member: msgspec.Raw, *, param: str) -> Media:
    """Count what is in a member of any shape; raises as `count_media`, for `param`."""
    media = Media(param)
    if bytes(memoryview(member)[:1]) in _COMPOSITE:
        try:
            _walk(media, msgspec.json.decode(member))
        except UNREADABLE:
            raise InvalidRequestError(f"{param} can't be read as JSON.", param=param) from None
    return media


def refuse_private_addresses(value: object, *, param: str) -> None:
    """Refuse texts that are nothing but the address of a file in the operator's cloud.

    LiteLLM takes such an input of an embedding for the file that it names.
    """
    for _, text in _strings({param: value}):
        if _PRIVATE.fullmatch(text):
            raise _not_taken(text, param)


def _walk(media: Media, root: object) -> None:
    # A stack, so that nothing depends on how deep a request is nested.
    nodes: list[object] = [root]
    while nodes:
        node = nodes.pop()
        if isinstance(node, list):
            nodes += cast("list[object]", node)
        elif isinstance(node, dict):
            members = cast("dict[str, object]", node)
            if not _count(media, members):
                nodes += members.values()


def _count(media: Media, part: Mapping[str, object]) -> bool:
    """Count an object if it is media."""
    kind = part.get("type")
    kind = kind if isinstance(kind, str) else None
    if kind in _REFUSED:
        raise InvalidRequestError(
            f"Content of type {kind!r} is not supported here.", param=media.param
        )
    if kind in _IMAGES or "image_url" in part:
        media.images += 1
        media.tokenless_bytes += _picture_bytes(part)
    elif kind in _SOUNDS or "input_audio" in part or "audio" in part:
        media.audio_clips += 1
        media.tokenless_bytes += _sound_bytes(part.get("input_audio"))
    elif kind in _FILES:
        media.files += 1
    else:
        return False
    for name, text in _strings(part):
        _check_source(name, text, media.param)
    return True


def _picture_bytes(part: Mapping[str, object]) -> int:
    if isinstance(source := part.get("source"), dict):
        return _source_bytes(cast("dict[str, object]", source))
    image = part.get("image_url")
    url = image
    if isinstance(image, dict):
        members = cast("dict[str, object]", image)
        url = members.get("url")
        # LiteLLM lets `format` overrule the media type, and text in a picture's clothes is text.
        mime = members.get("format") or "image/"
        if not (isinstance(mime, str) and mime.startswith("image/")):
            return 0
    if isinstance(url, str) and (prefix := _PICTURE.match(url)):
        return len(url) - prefix.end()
    return 0


def _source_bytes(source: Mapping[str, object]) -> int:
    """Bytes of a picture as Anthropic's API has it: its media type, and base64."""
    kind, data = source.get("media_type"), source.get("data")
    if isinstance(kind, str) and isinstance(data, str) and _MEDIA_TYPE.fullmatch(kind):
        return len(data)
    return 0


def _sound_bytes(sound: object) -> int:
    if not isinstance(sound, dict):
        return 0
    members = cast("dict[str, object]", sound)
    data, codec = members.get("data"), members.get("format")
    if isinstance(data, str) and isinstance(codec, str) and _CODEC.fullmatch(codec):
        return len(data) - -(-len(data) // _AUDIO_CHARACTERS_PER_TOKEN)
    return 0


def _check_source(name: str, text: str, param: str) -> None:
    """Refuse what would be read with the operator's own credentials.

    LiteLLM hands `gs://` to Google with the service's account, and ids of files name uploads of
    whoever owns the provider's key, which other customers may share.
    """
    if name in _PROSE:
        return
    scheme = _SCHEME.match(text)
    is_web = scheme is not None and scheme[1].lower() in ("http", "https")
    if (scheme is not None and not is_web) or (name == "file_id" and not is_web) or "gs://" in text:
        raise _not_taken(text, param)


def _not_taken(text: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(
        "Pictures, sound and files are taken as data URLs, base64 or https addresses only, "
        f"not as {text[:32]!r}.",
        param=param,
    )


def _strings(part: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """All strings of an object, however deep, each with the name of its member."""
    nodes: list[tuple[str, object]] = list(part.items())
    while nodes:
        name, node = nodes.pop()
        if isinstance(node, str):
            yield name, node
        elif isinstance(node, dict):
            nodes += cast("dict[str, object]", node).items()
        elif isinstance(node, list):
            nodes += [(name, item) for item in cast("list[object]", node)]
