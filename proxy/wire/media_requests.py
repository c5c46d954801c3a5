"""What requests to make pictures and speech, and to read pictures and speech, ask for.

Their answers are not bounded by a limit of the client's, but by what is asked for: so many
pictures, so many characters to speak, so much sound to write down.
"""

from collections.abc import Mapping

from proxy.errors import InvalidRequestError
from proxy.wire.body import checked_model, decoded, flag, model_of, read_body, whole_number
from proxy.wire.fields import Fields, is_null, raw
from proxy.wire.form import Form
from proxy.wire.request import Request

_MAX_PICTURES = 128
_TEXTS = frozenset({"text", "srt", "vtt"})
# The dearest picture of OpenAI's models that sell them by the token: 6,240 tokens at high quality
# (https://platform.openai.com/docs/guides/image-generation).
_TOKENS_PER_PICTURE = 8192
# 21 tokens of sound a second, 4 characters a second at the slowest speed that can be asked for.
_TOKENS_PER_CHARACTER = 6
# No codec takes less than 4 kbit/s for speech, and no model makes more than 50 tokens of a second.
_SOUND_BYTES_PER_S = 500
_TOKENS_PER_SOUND_S = 50
_TEXT_TOKENS_PER_SOUND_S = 10


def parse_image_request(body: bytes) -> Request:
    """Read a request to make pictures from a text."""
    fields = read_body(body)
    _refuse_stream(flag(fields, "stream"))
    if is_null(fields.get("prompt")):
        raise InvalidRequestError("prompt is required.", param="prompt")
    return Request(
        fields=fields,
        model=model_of(fields),
        prompt_bytes=len(body),
        n=(pictures := whole_number(fields, "n", _MAX_PICTURES) or 1),
        output_allowance=_TOKENS_PER_PICTURE,
        has_images=True,
        units={"images": pictures},
    )


def parse_speech_request(body: bytes) -> Request:
    """Read a request to speak a text."""
    fields = read_body(body)
    text = decoded(fields, "input", str, "a text")
    if not text:
        raise InvalidRequestError("input is required.", param="input")
    if decoded(fields, "stream_format", str, "a string") == "sse":
        raise InvalidRequestError(
            "stream_format sse is not supported here: sound is streamed as it is.",
            code="unsupported_parameter",
            param="stream_format",
        )
    return Request(
        fields=fields,
        model=model_of(fields),
        prompt_bytes=len(body),
        # The sound is passed on as it comes.
        stream=True,
        output_allowance=len(text) * _TOKENS_PER_CHARACTER,
        has_audio=True,
        units={"input_characters": len(text)},
    )


def parse_image_form(form: Form) -> Request:
    """Read a form with pictures to edit."""
    _refuse_streamed_form(form)
    pictures = _number(form, "n", _MAX_PICTURES)
    return Request(
        fields=_fields(form),
        model=checked_model(form.text("model")),
        form=form,
        prompt_bytes=form.texts_bytes(),
        images=len(form.files),
        n=pictures,
        output_allowance=_TOKENS_PER_PICTURE,
        has_images=True,
        units={"images": pictures},
    )


def parse_sound_form(form: Form) -> Request:
    """Read a form with sound to write down."""
    if [file.name for file in form.files] != ["file"]:
        raise InvalidRequestError("Send one file of sound, as the form's `file`.", param="file")
    _refuse_streamed_form(form)
    response_format = form.text("response_format")
    if response_format in {None, "text"}:
        # Without one LiteLLM would ask for a format that not every model has, and a text does not
        # say what it used: JSON has both.
        others = [(name, text) for name, text in form.texts if name != "response_format"]
        form.texts = [*others, ("response_format", "json")]
    seconds = -(-form.sizes() // _SOUND_BYTES_PER_S)
    return Request(
        fields=_fields(form),
        model=checked_model(form.text("model")),
        form=form,
        prompt_bytes=form.texts_bytes() + seconds * _TOKENS_PER_SOUND_S,
        output_allowance=seconds * _TEXT_TOKENS_PER_SOUND_S,
        has_audio=True,
        units={"audio_ms": seconds * 1000},
        is_text=response_format in _TEXTS,
    )


def _fields(form: Form) -> Fields:
    """The form's texts as members, for what is kept of a request; the last of each name."""
    texts: Mapping[str, str] = dict(form.texts)
    return {name: raw(text) for name, text in texts.items()}


def _number(form: Form, name: str, most: int) -> int:
    text = form.text(name) or "1"
    # A text of a million digits is no number that anybody should read.
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= most):
        raise InvalidRequestError(
            f"{name} must be a whole number between 1 and {most}.", param=name
        )
    return int(text)


def _refuse_streamed_form(form: Form) -> None:
    # What else than "true" a reader of forms takes for it is not for us to guess.
    _refuse_stream(form.text("stream") not in {None, "", "false"})


def _refuse_stream(asked: bool) -> None:  # noqa: FBT001 - read where it is called
    if asked:
        raise InvalidRequestError(
            "This endpoint is not streamed here: leave `stream` out.",
            code="unsupported_parameter",
            param="stream",
        )
