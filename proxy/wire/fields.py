"""JSON objects read one level deep: names, and values that stay the bytes that they came in."""

import msgspec

Fields = dict[str, msgspec.Raw]

NULL = msgspec.Raw(b"null")

# What msgspec raises for bytes that are no JSON, no UTF-8 or nested beyond the stack.
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_DECODER = msgspec.json.Decoder(Fields)


def read_fields(document: bytes) -> Fields:
    """Read an object's members, the last one of each name; raises one of UNREADABLE."""
    return _DECODER.decode(document)


def is_null(raw: msgspec.Raw | None) -> bool:
    """Whether a member is absent or null, which means the same everywhere in OpenAI's API."""
    return raw is None or bytes(raw) == b"null"


def value_of(raw: msgspec.Raw | None) -> object:
    """Decode a member; None where it is absent, null or unreadable."""
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw)
    except UNREADABLE:
        return None


def raw(value: object) -> msgspec.Raw:
    """Encode a value as a member."""
    return msgspec.Raw(msgspec.json.encode(value))
