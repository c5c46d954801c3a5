"""What a replay under a draft predicts is what billing does once the draft is published."""

import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from tests.e2e.conftest import Guest, House
from tests.support.calls import CALLS
from tests.support.provider import FakeProvider, Reply
from tests.support.service import ADMIN_KEY, ROOT

LIVE = """
price_book:
  default: {kind: markup, factor: "2.0", byok_fee_percent: "5"}
  rules:
    - {model: claude-unpriced, kind: flat, credits: "1", allow_loss: true}
"""
OWN_KEY = {"X-Provider-Key": "sk-the-customers-own-provider-key"}
ODD_COUNTS = ((7, 3), (1013, 77), (1, 1))
DRAFTS = "/admin/v1/price-books/drafts"


def draft_for(account_id: str) -> dict[str, Any]:
    """A book that changes every kind of price, each by amounts that don't come out even."""
    return {
        "default": {
            "kind": "markup", "factor": "1.370001", "minimum": "0.0013", "byok_fee_percent": "3.3",
        },
        "rules": [
            {
                "model": "priced", "kind": "per_token", "multiplier": "1.7", "allow_loss": True,
                "credits": {"input": "0.123456789", "output": "1.1"},
            },
            {"model": "odd-*", "kind": "markup", "factor": "1.013"},
            {"model": "embed", "kind": "flat", "credits": "0.25"},
            {"model": "unpriced", "kind": "flat", "credits": "0.5", "allow_loss": True},
            {"account": account_id, "model": "odd-cents", "kind": "markup", "factor": "2.5"},
        ],
    }  # fmt: skip


def run_traffic(house: House, guests: list[Guest], provider: FakeProvider) -> None:
    for guest in guests:
        provider.reset()
        with house.service.client(guest.customer.key) as client:
            for call in CALLS.values():
                assert call.send(client, guest.customer.key).is_success
        for model in ("priced", "odd-cents", "cached"):
            for prompt_tokens, completion_tokens in ODD_COUNTS:
                reply = Reply(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
                provider.reply(model, reply)
                assert guest.chat(model=model).is_success
        assert guest.chat(stream=True).is_success
        for model in ("priced", "cached"):
            assert guest.chat(model=model, http_headers=OWN_KEY).is_success
        assert guest.chat(model="unpriced").is_success
        assert guest.chat(model="claude-unpriced").is_success


def billed(house: House, since: datetime, until: datetime | None = None) -> Counter[str]:
    """What billing took, in nano-USD by model; what waits for a review has no price."""
    rows = house.rows(
        "SELECT model, price, status FROM usage WHERE request_id >= uuid_floor(%s)"
        " AND request_id < uuid_floor(%s)",
        since,
        until or datetime.now(UTC) + timedelta(minutes=1),
    )
    assert {row["status"] for row in rows} == {"billed", "byok", "needs_review"}
    taken: Counter[str] = Counter()
    for row in rows:
        taken[row["model"]] += row["price"] or 0
        taken["of no price"] += row["price"] is None
    return taken


def nanos(money: dict[str, str]) -> int:
    amount = Decimal(money["usd"]) * 10**9
    assert amount == int(amount)
    return int(amount)


def test_replay_of_a_draft_predicts_what_the_published_draft_bills(
    make_house: Callable[..., House], provider: FakeProvider
) -> None:
    house = make_house(config=LIVE)
    guests = [house.customer(credits="100000") for _ in range(2)]
    admin = house.service.admin
    began = datetime.now(UTC)
    run_traffic(house, guests, provider)

    document = draft_for(guests[1].customer.account_id)
    draft = f"{DRAFTS}/{admin('POST', DRAFTS, {'name': 'next', 'document': document})['id']}"
    turn = datetime.now(UTC)
    period = {"from": began.isoformat(), "until": turn.isoformat()}
    predicted = admin("POST", draft + "/replay", period)
    version = admin("POST", draft + "/publish", {})["version"]
    run_traffic(house, guests, provider)

    before, after = billed(house, began, turn), billed(house, turn)
    assert (before.pop("of no price"), after.pop("of no price")) == (2, 2)
    now, then = predicted["revenue"]["now"], predicted["revenue"]["draft"]
    waiting = predicted["waiting"]
    assert (waiting["requests"], waiting["priced"]) == (2, 2)
    assert nanos(now) == before.total()
    assert nanos(then) + nanos(waiting["revenue"]) == after.total()
    assert nanos(predicted["revenue"]["change"]) == nanos(then) - nanos(now)
    assert predicted["requests"] == 2 * (len(CALLS) + 3 * len(ODD_COUNTS) + 4)
    # Model by model, but for the one that has a price only now.
    assert nanos(waiting["revenue"]) == after.pop("unpriced")
    assert {row["model"]: nanos(row["revenue"]["draft"]) for row in predicted["models"]} == after
    assert sum(row["requests"] for row in predicted["models"]) == predicted["requests"]
    (unpriced,) = predicted["unpriced"]
    assert (unpriced["reason"], unpriced["requests"]) == ("no_cost_to_mark_up", 2)
    assert nanos(unpriced["revenue"]) == before["claude-unpriced"]
    assert after["claude-unpriced"] == 0

    # Under what it was billed by, it is billed the same.
    copy = f"{DRAFTS}/{admin('POST', DRAFTS, {'name': 'same'})['id']}"
    period = {"from": turn.isoformat(), "until": datetime.now(UTC).isoformat()}
    same = admin("POST", copy + "/replay", period)
    assert (nanos(same["revenue"]["change"]), same["unpriced"]) == (0, [])
    assert nanos(same["revenue"]["now"]) == after.total() + nanos(waiting["revenue"])
    sold_under = "SELECT DISTINCT price_version FROM usage WHERE request_id >= uuid_floor(%s)"
    assert [row["price_version"] for row in house.rows(sold_under, turn)] == [version]


def test_commands_of_the_page_on_prices_work(make_house: Callable[..., House]) -> None:
    house = make_house(config=LIVE, litellm_url="http://127.0.0.1:1", wait=False)
    page = (ROOT / "docs" / "selling.md").read_text()
    (commands,) = re.findall(r"## Prices.*?```sh\n(.*?)```", page, re.DOTALL)
    # Each command stands in a line of its own, and answers one.
    strict = "set -eo pipefail; curl() { command curl --fail-with-body -w '\\n' \"$@\"; }\n"
    done = subprocess.run(
        ["bash", "-c", strict + commands],  # noqa: S607 - whichever the machine has
        env={**os.environ, "URL": house.service.base_url, "ADMIN": ADMIN_KEY},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    versions = house.service.admin("GET", "/admin/v1/price-books")["data"]
    assert [(row["version"], row["state"]) for row in versions] == [
        (6, "in_force"), (5, "past"), (4, "past"), (3, "past"), (2, "cancelled"), (1, "past"),
    ]  # fmt: skip
    assert versions[0]["document"] == versions[-1]["document"]
