"""Forms that are malformed, hostile or both: LiteLLM gets one that was written anew."""

import socket
from typing import Any

import httpx
import pytest

from tests.e2e.surface import EVIL, Surface, surface
from tests.support.calls import CALLS, FORM_CALLS, JSON_CALLS, Call

__all__ = ["surface"]

EDIT = FORM_CALLS["/v1/images/edits"]
SOUND = FORM_CALLS["/v1/audio/transcriptions"]
FORM = "multipart/form-data; boundary=b"


def part(name: str, data: str | bytes, **attributes: str) -> bytes:
    """One part of a form; `filename` and `kind` as they are to stand there."""
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"'
    if "filename" in attributes:
        head += f'; filename="{attributes["filename"]}"'
    if "kind" in attributes:
        head += f"\r\nContent-Type: {attributes['kind']}"
    return (
        head.encode() + b"\r\n\r\n" + (data if isinstance(data, bytes) else data.encode()) + b"\r\n"
    )


def form_of(call: Call, *more: bytes) -> bytes:
    """The plain call's form with more parts behind its file."""
    assert call.files is not None
    texts = [part(name, text) for name, text in call.body.items()]
    files = [part(name, data, filename=file) for name, (file, data) in call.files.items()]
    return b"".join([*texts, *files, *more]) + b"--b--\r\n"


def send(surface: Surface, call: Call, body: bytes, content_type: str = FORM) -> httpx.Response:
    surface.begin(call)
    headers = {
        "authorization": f"Bearer {surface.attacker.customer.key}",
        "content-type": content_type,
    }
    answer = surface.client.post(call.path, content=body, headers=headers)
    surface.assert_harmless(call, answer)
    return answer


FORMS = pytest.mark.parametrize("call", FORM_CALLS.values(), ids=FORM_CALLS)


@FORMS
def test_form_of_the_tests_is_the_plain_call(surface: Surface, call: Call) -> None:
    assert send(surface, call, form_of(call)).status_code == 200


@FORMS
@pytest.mark.parametrize("name", ["model", "n", "stream", "response_format"])
def test_text_given_twice_is_refused(surface: Surface, call: Call, name: str) -> None:
    if call is SOUND and name == "n":
        return
    again = part(name, str(call.body.get(name, "1")))
    answer = send(surface, call, form_of(call, again, again))
    surface.assert_refused(call, answer, param=name)


@FORMS
@pytest.mark.parametrize("name", ["model", "metadata", "api_key", "litellm_metadata", "n", "tags"])
def test_file_in_the_place_of_a_text_is_refused(surface: Surface, call: Call, name: str) -> None:
    answer = send(surface, call, form_of(call, part(name, "dear", filename="x")))
    surface.assert_refused(call, answer)


@FORMS
def test_text_in_the_place_of_a_file_is_refused(surface: Surface, call: Call) -> None:
    for name in call.files or ():
        answer = send(surface, call, form_of(call, part(name, "https://example.com/a.png")))
        surface.assert_refused(call, answer, param=name)


@FORMS
def test_part_after_the_file_is_read_like_one_before_it(surface: Surface, call: Call) -> None:
    answer = send(surface, call, form_of(call, part("custom_llm_provider", "anthropic")))
    surface.assert_refused(call, answer, param="custom_llm_provider")
    answer = send(surface, call, form_of(call, part("metadata", '{"model_group": "free"}')))
    assert answer.status_code == 200, answer.text


@FORMS
def test_part_after_the_last_boundary_is_no_part(surface: Surface, call: Call) -> None:
    answer = send(surface, call, form_of(call) + part("api_base", EVIL) + b"--b--\r\n")
    assert answer.status_code == 200, answer.text


FILE_NAMES = [
    "a.png\r\nx-evil: 1",
    "a.png\\r\\nx-evil: 1",
    'a".png"; name="model',
    "../../etc/passwd",
    "C:\\evil.png",
    "\u202egnp.exe",
    "%22; name=%22model",
    "a" * 1000,
    "a;b=c.png",
    ".",
]


@FORMS
@pytest.mark.parametrize("name", FILE_NAMES, ids=range(len(FILE_NAMES)))
def test_name_of_a_file_is_only_a_name(surface: Surface, call: Call, name: str) -> None:
    ((field, (_, data)),) = (call.files or {}).items()
    texts = [part(each, text) for each, text in call.body.items()]
    body = b"".join([*texts, part(field, data, filename=name)]) + b"--b--\r\n"
    assert send(surface, call, body).status_code in {200, 400}


@FORMS
@pytest.mark.parametrize(
    "kind",
    [
        'text/plain"; name="model',
        "audio/wav; charset=\x85x",
        "multipart/mixed; boundary=c",
        "application/x-www-form-urlencoded",
        "audio/\u00e9",
        "",
        "x" * 3000,
    ],
)
def test_content_type_of_a_part_is_only_a_type(surface: Surface, call: Call, kind: str) -> None:
    ((field, (file, data)),) = (call.files or {}).items()
    texts = [part(each, text) for each, text in call.body.items()]
    body = b"".join([*texts, part(field, data, filename=file, kind=kind)]) + b"--b--\r\n"
    assert send(surface, call, body).status_code in {200, 400}


MALFORMED: dict[str, tuple[bytes, str]] = {
    "no boundary": (form_of(EDIT), "multipart/form-data"),
    "empty boundary": (form_of(EDIT), "multipart/form-data; boundary="),
    "other boundary": (form_of(EDIT), "multipart/form-data; boundary=c"),
    "long boundary": (form_of(EDIT), f"multipart/form-data; boundary={'b' * 500}"),
    "unfinished": (form_of(EDIT).removesuffix(b"--b--\r\n"), FORM),
    "cut in its file": (form_of(EDIT)[:-20], FORM),
    "empty": (b"", FORM),
    "only the end": (b"--b--\r\n", FORM),
    "garbage": (b"\x00\xff" * 500, FORM),
    "nameless part": (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n", FORM),
    "empty name": (part("", "x") + form_of(EDIT), FORM),
    "attachment": (b'--b\r\nContent-Disposition: attachment; name="model"\r\n\r\nx\r\n--b--', FORM),
    "no disposition": (b"--b\r\nContent-Type: text/plain\r\n\r\nx\r\n--b--\r\n", FORM),
    "text not UTF-8": (part("prompt", b"\xff\xfe") + form_of(EDIT), FORM),
    "name not UTF-8": (form_of(EDIT).replace(b'"prompt"', b'"prompt\xff"'), FORM),
    "name with a line": (part("a\r\nb", "x") + form_of(EDIT), FORM),
    "many parts": (part("prompt", "x") * 500 + form_of(EDIT), FORM),
    "long text": (part("prompt", "x" * 2_000_000) + form_of(EDIT), FORM),
    "long header": (
        form_of(EDIT).replace(b"--b\r\n", b"--b\r\nX: " + b"x" * 100_000 + b"\r\n"),
        FORM,
    ),
    "many headers": (form_of(EDIT).replace(b"--b\r\n", b"--b\r\n" + b"X: x\r\n" * 5000), FORM),
    "JSON": (b'{"model": "image", "prompt": "x"}', "application/json"),
    "form in JSON's clothes": (form_of(EDIT), "application/json"),
    "urlencoded": (b"model=image&prompt=x", "application/x-www-form-urlencoded"),
    "no content type": (form_of(EDIT), ""),
    "mixed": (form_of(EDIT), "multipart/mixed; boundary=b"),
    "no file": (part("model", "transcribe") + b"--b--\r\n", FORM),
}


@FORMS
@pytest.mark.parametrize("case", MALFORMED)
def test_form_that_is_none_is_refused(surface: Surface, call: Call, case: str) -> None:
    body, content_type = MALFORMED[case]
    if call is EDIT and case == "no file":
        return
    answer = send(surface, call, body.replace(b"image", call.model.encode()), content_type)
    surface.assert_refused(call, answer)
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("path", JSON_CALLS)
def test_form_is_refused_where_json_is_taken(surface: Surface, path: str) -> None:
    call = JSON_CALLS[path]
    for body, content_type in (
        (form_of(EDIT), FORM),
        (b"model=priced", "application/x-www-form-urlencoded"),
    ):
        surface.assert_refused(call, send(surface, call, body, content_type))


@FORMS
@pytest.mark.parametrize(
    "name, value",
    [
        ("n", "0"),
        ("n", "-1"),
        ("n", "1e3"),
        ("n", "129"),
        ("n", "9" * 5000),
        ("n", "\u0663"),
        ("stream", "true"),
        ("stream", "True"),
        ("stream", "1"),
        ("stream", "on"),
    ],
)
def test_text_that_decides_about_money_is_read_strictly(
    surface: Surface, call: Call, name: str, value: str
) -> None:
    if call is SOUND and name == "n":
        return
    answer = surface.attack(call, {name: value})
    surface.assert_refused(call, answer, param=name)


def test_upload_over_the_limit_is_refused_before_it_came(surface: Surface, make_house: Any) -> None:
    small = make_house(environ={"TALLYGATE_MAX_UPLOAD_BYTES": "20000"})
    key = small.customer().customer.key
    surface.provider.reset()
    big = form_of(SOUND, part("prompt", "x" * 30_000))
    headers = {"authorization": f"Bearer {key}", "content-type": FORM}
    with small.service.client(key) as client:
        declared = client.post(SOUND.path, content=big, headers=headers)
        chunked = client.post(
            SOUND.path, content=iter([big[:15_000], big[15_000:]]), headers=headers
        )
    for answer in (declared, chunked):
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert not surface.provider.requests


@FORMS
def test_client_that_leaves_in_the_middle_of_its_form_harms_nobody(
    surface: Surface, call: Call
) -> None:
    surface.provider.reset()
    body = form_of(call)
    head = (
        f"POST {call.path} HTTP/1.1\r\nhost: x\r\ncontent-type: {FORM}\r\n"
        f"authorization: Bearer {surface.attacker.customer.key}\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", surface.house.service.port)) as connection:
        connection.sendall(head.encode() + body[:-10])
    surface.assert_bystander_served(CALLS[call.path])
