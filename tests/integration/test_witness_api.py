"""The endpoint that the witness inside LiteLLM reports to."""

from typing import Any
from uuid import uuid4

import pytest

from proxy.witness import Report, WitnessReports
from tests.support.api import Api

pytestmark = pytest.mark.anyio

PATH = "/internal/v1/witness"
TOKEN = "token-of-the-witness"


class Taken(WitnessReports):
    """Keeps what is taken, in place of working it off."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.malformed = self.dropped = 0

    def take(self, reports: Any, *, malformed: int = 0, dropped: int = 0) -> None:
        self.reports += reports
        self.malformed += malformed
        self.dropped += dropped


def report(**changes: object) -> dict[str, object]:
    return {
        "call_id": str(uuid4()),
        "account_id": str(uuid4()),
        "outcome": "success",
        "attempt": "a",
        "attempts": 1,
        "cost": "6e-05",
        "usage": {"prompt_tokens": 10},
        **changes,
    }


async def test_reports_are_taken(api: Api) -> None:
    taken = Taken()
    one, other = report(), report(cost=None, unheard_of={"x": [1]}, margin="1e-06")
    body = {"reports": [one, other], "dropped": 3, "unheard_of": 1}
    answer = await api.with_(witness=taken, witness_token=TOKEN).call(
        "POST", PATH, key=TOKEN, json=body
    )
    assert (answer.status_code, answer.json()) == (202, {"taken": 2})
    assert [str(item.call_id) for item in taken.reports] == [one["call_id"], other["call_id"]]
    assert [item.cost for item in taken.reports] == ["6e-05", None]
    assert (taken.malformed, taken.dropped) == (0, 3)


@pytest.mark.parametrize(
    "malformed",
    [
        None,
        7,
        [],
        {},
        report(call_id="x"),
        report(account_id=None),
        report(outcome="perhaps"),
        report(attempt=None),
        report(attempt="a" * 65),
        report(attempts=0),
        report(attempts=10**6),
        report(cost=6e-05),
        report(cost="1" * 65),
        report(usage=[1]),
    ],
)
async def test_a_malformed_report_holds_up_none_of_the_others(api: Api, malformed: object) -> None:
    taken = Taken()
    answer = await api.with_(witness=taken, witness_token=TOKEN).call(
        "POST", PATH, key=TOKEN, json={"reports": [report(), malformed, report()]}
    )
    assert (answer.status_code, answer.json()) == (202, {"taken": 2})
    assert (len(taken.reports), taken.malformed) == (2, 1)


@pytest.mark.parametrize("key", [None, "wrong", TOKEN + "x", "ü"])
async def test_nobody_reports_without_the_token(api: Api, key: str | None) -> None:
    taken = Taken()
    guarded = api.with_(witness=taken, witness_token=TOKEN)
    headers = {} if key is None else {"authorization": f"Bearer {key}".encode("latin-1")}
    answer = await guarded.call("POST", PATH, json={"reports": [report()]}, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_token"
    assert not taken.reports


@pytest.mark.parametrize("token", [None, ""])
async def test_without_a_token_there_is_no_such_path(api: Api, token: str | None) -> None:
    bare = api.with_(witness=Taken(), witness_token=token)
    for key in (None, "", TOKEN):
        assert (await bare.call("POST", PATH, key=key, json={})).status_code == 404


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"{}", b'{"reports": 1}', b"\xff", b"[" * 100_000]
)
async def test_what_is_no_batch_is_refused(api: Api, content: bytes) -> None:
    guarded = api.with_(witness=Taken(), witness_token=TOKEN)
    await guarded.refused("POST", PATH, 400, key=TOKEN, content=content)


async def test_batch_is_bounded(api: Api) -> None:
    guarded = api.with_(witness=Taken(), witness_token=TOKEN)
    await guarded.refused("POST", PATH, 413, key=TOKEN, content=b" " * 2**21)
    await guarded.refused("GET", PATH, 405, key=TOKEN)
