"""Forms as they come, and as they go on."""

import io
import tempfile
from collections.abc import Iterator

import pytest

from proxy.errors import InvalidRequestError
from proxy.wire.form import Form, FormBody, FormFile, FormReader

KIND = "multipart/form-data; boundary=b"


def part(name: str, data: bytes | str = b"x", *, filename: str | None = None) -> bytes:
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"'
    head += "" if filename is None else f'; filename="{filename}"'
    data = data.encode() if isinstance(data, str) else data
    return head.encode() + b"\r\n\r\n" + data + b"\r\n"


END = b"--b--\r\n"
PLAIN = part("model", "m") + part("file", b"RIFF\r\n--x", filename="a.wav") + END


def read(body: bytes, kind: str | None = KIND, *, step: int = 1 << 20) -> Form:
    reader = FormReader(kind)
    try:
        for start in range(0, len(body), step):
            reader.feed(body[start : start + step])
        form = reader.end()
        # Their contents are looked at before they go.
        contents = [(file.content.seek(0), file.content.read())[1] for file in form.files]
    finally:
        reader.close()
    form.files = [
        FormFile(file.name, file.filename, file.content_type, io.BytesIO(content), file.size)
        for file, content in zip(form.files, contents, strict=True)
    ]
    return form


async def written(body: FormBody) -> bytes:
    sent = b"".join([chunk async for chunk in body.chunks()])
    assert str(len(sent)) == body.headers["content-length"]
    return sent


@pytest.mark.parametrize("step", [1, 2, 7, 64, 1 << 20])
def test_form_is_the_same_however_it_is_cut(step: int) -> None:
    form = read(PLAIN, step=step)
    assert form.texts == [("model", "m")]
    (file,) = form.files
    assert (file.name, file.filename, file.size) == ("file", "a.wav", 9)
    assert file.content.read() == b"RIFF\r\n--x"
    assert form.digest == read(PLAIN).digest


def test_digest_does_not_depend_on_the_boundary_but_on_the_parts() -> None:
    other = read(PLAIN.replace(b"--b", b"--other"), "multipart/form-data; boundary=other")
    assert other.digest == read(PLAIN).digest
    others = (
        part("a", "x"),
        part("a", "y"),
        part("b", "x"),
        part("a", "x", filename="f"),
        part("a", "x") + part("a", "x"),
        part("a", "") + part("ax", ""),
    )
    assert len({read(body + END).digest for body in others}) == len(others)


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "",
        "application/json",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/mixed; boundary=b",
        "application/x-www-form-urlencoded",
        f"multipart/form-data; boundary={'b' * 129}",
        f"multipart/form-data; boundary={'b' * 5000}",
    ],
)
def test_what_is_no_form_is_refused_before_it_is_read(kind: str | None) -> None:
    with pytest.raises(InvalidRequestError):
        FormReader(kind)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x",
        END[:-4],
        PLAIN[: -len(END)],
        PLAIN[:-30],
        b"--c--\r\n",
        b'--b\r\nContent-Disposition: form-data; name=""\r\n\r\nx\r\n' + END,
        b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + END,
        b'--b\r\nContent-Disposition: attachment; name="a"\r\n\r\nx\r\n' + END,
        b"--b\r\nContent-Type: text/plain\r\n\r\nx\r\n" + END,
        b"--b\r\n\r\nx\r\n" + END,
        b'--b\r\nContent-Disposition form-data; name="a"\r\n\r\nx\r\n' + END,
        part("a", b"\xff") + END,
        part("a") * 129 + END,
        part("a", "x" * (1024 * 1024 + 1)) + END,
        b"--b\r\nX: " + b"x" * 100_000 + b"\r\n\r\nx\r\n" + END,
        b"--b\r\n" + b"X: x\r\n" * 1000 + b"\r\nx\r\n" + END,
    ],
)
@pytest.mark.parametrize("step", [13, 1 << 20])
def test_form_that_is_not_whole_or_out_of_bounds_is_refused(body: bytes, step: int) -> None:
    with pytest.raises(InvalidRequestError):
        read(body, step=step)


def test_bounds_themselves_are_within() -> None:
    form = read(part("a") * 128 + END)
    assert len(form.texts) == 128
    assert read(part("a", "x" * 1024 * 1024) + END).texts_bytes() == 1024 * 1024


def test_files_are_closed_with_their_form_even_an_unfinished_one() -> None:
    reader = FormReader(KIND)
    reader.feed(PLAIN)
    form = reader.end()
    form.close()
    assert all(file.content.closed for file in form.files)
    reader = FormReader(KIND)
    reader.feed(PLAIN[:-20])
    reader.close()  # a file that stayed open would warn


def test_part_behind_the_end_is_none() -> None:
    assert [name for name, _ in read(PLAIN + part("api_key") + END).texts] == ["model"]


def test_text_given_twice_is_refused_when_it_is_asked_for() -> None:
    form = read(part("n", "1") + part("n", "2") + END)
    assert form.text("model") is None
    with pytest.raises(InvalidRequestError) as refused:
        form.text("n")
    assert refused.value.param == "n"


@pytest.fixture
def content() -> Iterator[tempfile.SpooledTemporaryFile[bytes]]:
    with tempfile.SpooledTemporaryFile[bytes](10) as file:
        file.write(b"0123456789abcdef")
        yield file


NAMES = [
    "a.png\r\nx-evil: 1",
    'a"; name="model',
    "a\\",
    "\u202egnp.exe",
    "\x00",
    "",
    "a;b=c",
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
@pytest.mark.parametrize("kind", ["image/png", 'x"; name="model', "a\r\nx-evil: 1", "\x85\u2028"])
@pytest.mark.anyio
async def test_names_and_types_can_not_leave_their_line(
    content: tempfile.SpooledTemporaryFile[bytes], name: str, kind: str
) -> None:
    file = FormFile("image", name, kind, content, 16)
    body = FormBody([("prompt", "a\r\n--b\r\nb")], [file], {"api_key": "sk-x"})
    sent = await written(body)
    again = read(sent, body.headers["content-type"])
    assert again.texts == [("prompt", "a\r\n--b\r\nb"), ("api_key", "sk-x")]
    (passed,) = again.files
    assert (passed.name, passed.size) == ("image", 16)
    head = sent[: sent.index(b"0123456789")].decode().rsplit("--", 1)[-1]
    # The boundary, two headers, an empty line.
    assert len(head.split("\r\n")) == 5


def test_form_is_written_with_a_boundary_that_nobody_can_guess() -> None:
    boundaries = {FormBody([("a", "b")], [], {}).headers["content-type"] for _ in range(3)}
    assert len(boundaries) == 3
