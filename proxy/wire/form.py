"""Multipart forms: read as they arrive, written anew for LiteLLM, files on disk in between.

The model may stand behind the file in a form, and nothing goes upstream before it is known whose
money pays for it. So a form is read whole first; a file of more than a megabyte is on disk
meanwhile, never in memory. What is sent on is made of the parts that may pass, never of the bytes
that came.
"""

import hashlib
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from proxy.errors import InvalidRequestError

_IN_MEMORY_BYTES = 1024 * 1024
_CHUNK_BYTES = 256 * 1024
_MAX_PARTS = 128
# https://www.rfc-editor.org/rfc/rfc2046#section-5.1.1 allows 70; the parser raises above 256.
_MAX_BOUNDARY_BYTES = 128
_MAX_FIELD_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class FormFile:
    """A file of a form; `content` stands at its beginning."""

    name: str
    filename: str
    content_type: str
    content: IO[bytes]
    size: int


@dataclass(slots=True)
class Form:
    """A form's texts, in order, and its files; `close` it in any case.

    `digest` is the same for the same parts, whatever boundary they came with.
    """

    texts: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    files: list[FormFile] = field(default_factory=list[FormFile])
    digest: bytes = b""

    def close(self) -> None:
        """Give up the files."""
        for file in self.files:
            file.content.close()

    def text(self, name: str) -> str | None:
        """Return a text by its name; InvalidRequestError where it is given twice."""
        found = [text for given, text in self.texts if given == name]
        if len(found) > 1:
            raise InvalidRequestError(f"{name} is given more than once.", param=name)
        return found[0] if found else None

    def sizes(self) -> int:
        """Bytes of all its files."""
        return sum(file.size for file in self.files)

    def texts_bytes(self) -> int:
        """UTF-8 bytes of all its texts."""
        return sum(len(text.encode()) for _, text in self.texts)


class FormReader:
    """Reads one form; `feed` it what arrives, then `end`."""

    def __init__(self, content_type: str | None) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not boundary:
            raise InvalidRequestError(
                "This endpoint takes a form: send content-type multipart/form-data."
            )
        self.form = Form()
        self._ended = False
        self._header_name = b""
        self._header_value = b""
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._filename: str | None = None
        self._text = bytearray()
        self._file: IO[bytes] | None = None
        self._size = 0
        self._digest = hashlib.blake2b(digest_size=32)
        if len(boundary) > _MAX_BOUNDARY_BYTES:
            raise InvalidRequestError("The form's boundary is too long.")
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._take_header_name,
                "on_header_value": self._take_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": self._take_data,
                "on_part_end": self._end_part,
                "on_end": self._finish,
            },
        )

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes; InvalidRequestError where they are no form."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise InvalidRequestError(f"The form can't be read: {error}") from None

    def end(self) -> Form:
        """Return the form; InvalidRequestError where it is not whole."""
        if not self._ended:
            raise InvalidRequestError("The form ends before its last boundary.")
        self.form.digest = self._digest.digest()
        return self.form

    def close(self) -> None:
        """Give up what was read of a form that is not used."""
        if self._file is not None:
            self._file.close()
        self.form.close()

    def _begin(self) -> None:
        if len(self.form.texts) + len(self.form.files) >= _MAX_PARTS:
            raise InvalidRequestError(f"A form may have at most {_MAX_PARTS} parts.")
        self._headers = {}
        self._text = bytearray()
        self._size = 0

    def _take_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _take_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _end_headers(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"name")
        if kind != b"form-data" or not name:
            raise InvalidRequestError("Each part of the form needs a name.")
        self._name = _text(name)
        filename = options.get(b"filename")
        self._filename = None if filename is None else _text(filename)
        head = f"{len(self._name)}:{self._name}:{self._filename is not None}:"
        self._digest.update(head.encode())
        if self._filename is not None:
            # It lives until the request has ended: `Form.close`.
            self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES)  # noqa: SIM115

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        self._digest.update(memoryview(data)[start:end])
        if self._file is not None:
            self._file.write(data[start:end])
        elif self._size > _MAX_FIELD_BYTES:
            raise InvalidRequestError("A text of the form is too long.", param=self._name)
        else:
            self._text += data[start:end]

    def _end_part(self) -> None:
        self._digest.update(b":%d;" % self._size)
        if self._file is None:
            self.form.texts.append((self._name, _text(bytes(self._text))))
            return
        kind = self._headers.get(b"content-type", b"application/octet-stream")
        self.form.files.append(
            FormFile(self._name, self._filename or "", _text(kind), self._file, self._size)
        )
        self._file = None

    def _finish(self) -> None:
        self._ended = True


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidRequestError("The texts of the form must be UTF-8.") from None


class FormBody:
    """A form as it goes upstream: its headers are known before, its bytes come as they are read."""

    def __init__(
        self, texts: Sequence[tuple[str, str]], files: Sequence[FormFile], extra: Mapping[str, str]
    ) -> None:
        self._boundary = os.urandom(24).hex()
        self._files = files
        self._head = b"".join(
            self._part(name) + text.encode() + b"\r\n" for name, text in (*texts, *extra.items())
        )
        self._tail = f"--{self._boundary}--\r\n".encode()
        self._openings = [self._part(f.name, f.filename, f.content_type) for f in files]

    @property
    def headers(self) -> dict[str, str]:
        """Content type and length."""
        length = len(self._head) + len(self._tail)
        length += sum(len(opening) + 2 for opening in self._openings)
        length += sum(file.size for file in self._files)
        return {
            "content-type": f"multipart/form-data; boundary={self._boundary}",
            "content-length": str(length),
        }

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the form's bytes.

        Files are read in the loop: they were written a moment ago, so that they come from memory.
        """
        for chunk in self._each():
            yield chunk

    def _each(self) -> Iterator[bytes]:
        yield self._head
        for opening, file in zip(self._openings, self._files, strict=True):
            yield opening
            file.content.seek(0)
            while chunk := file.content.read(_CHUNK_BYTES):
                yield chunk
            yield b"\r\n"
        yield self._tail

    def _part(
        self, name: str, filename: str | None = None, content_type: str | None = None
    ) -> bytes:
        head = f'--{self._boundary}\r\ncontent-disposition: form-data; name="{_quoted(name)}"'
        if filename is not None:
            head += f'; filename="{_quoted(filename)}"'
        if content_type is not None:
            head += f"\r\ncontent-type: {_one_line(content_type)}"
        return head.encode() + b"\r\n\r\n"


def _quoted(text: str) -> str:
    """Write a name as browsers do (https://html.spec.whatwg.org/#multipart-form-data)."""
    return text.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


def _one_line(text: str) -> str:
    return " ".join(text.split())
