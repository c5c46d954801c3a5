"""An account with rows of every kind, and what a request to any endpoint needs of it.

What a path's parameter stands for is made by the POST of the list that it stands in. Where there is
no such, a maker belongs into `_MAKERS`; the tests that go through all endpoints say so.
"""

import json
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx

from proxy.accounts import hash_key
from proxy.ids import uuid7
from tests.integration.money import Money, capture, void
from tests.support.examples import example_of
from tests.support.service import ADMIN_KEY

Call = Callable[..., Awaitable[httpx.Response]]

CREDIT = 1_000_000
# What the price book of the service must have an action of.
ACTION = "example"
PRICE_BOOK = {"default": {"kind": "markup", "factor": "2"}, "actions": {ACTION: "1"}}
# Parameters of paths that are nobody's.
WORDS = frozenset({"month", "version"})
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# What accounts share with each other, or have of operators.
_SHARED_TABLES = frozenset({"seals"})


@dataclass
class Estate:
    """An account; `ids` are its things by the name that paths have for them."""

    money: Money
    call: Call
    keys: dict[str, str] = field(default_factory=dict[str, str])
    ids: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def account_id(self) -> str:
        """The account's id."""
        return str(self.money.account_id)

    @property
    def key(self) -> str:
        """A virtual key that may do everything; no path leads to it."""
        return self.keys["manage"]

    async def id_of(self, name: str) -> str:
        """Return the id of the thing that paths call so; it is made at the first call."""
        if name not in self.ids:
            make = _MAKERS.get(name)
            self.ids[name] = await (self._posted(name) if make is None else make(self))
        return self.ids[name]

    async def path(self, template: str) -> str:
        """Fill a path's parameters with the ids of this account's things."""
        for name in re.findall(r"\{(\w+)\}", template):
            template = template.replace(f"{{{name}}}", await self.id_of(name))
        return template

    async def _posted(self, name: str) -> str:
        """Make a thing by the POST of the list that it stands in."""
        document = (await self.call("GET", "/openapi.json", key=self.key)).json()
        lists = [
            path.removesuffix(f"/{{{name}}}")
            for path in document["paths"]
            if path.endswith(f"/{{{name}}}")
        ]
        lists = [path for path in lists if "post" in document["paths"].get(path, {})]
        assert lists, (
            f"no way is known to make what paths call {name}: tell it to `_MAKERS` in "
            "tests/support/estate.py, so that isolation and contract are tested of it"
        )
        content = document["paths"][lists[0]]["post"]["requestBody"]["content"]
        body = example_of(content["application/json"]["schema"], document, self.ids)
        if "name" in body:
            body["name"] = f"example {uuid7()}"  # some are unique
        key = self.key if lists[0].startswith("/api/") else ADMIN_KEY
        answer = await self.call("POST", await self.path(lists[0]), key=key, json=body)
        assert answer.is_success, f"POST {lists[0]}: {answer.status_code} {answer.text}"
        return str(answer.json()["id"])

    def new_key(self, role: str) -> str:
        """Make a virtual key of this role and return its secret."""
        secret = "sk-" + secrets.token_urlsafe(32)
        document = {"key_id": str(uuid7()), "name": role, "prefix": secret[:10], "role": role}
        self.money.one(
            "SELECT create_key(%s, %s, %s, 'test')",
            self.money.account_id,
            hash_key(secret),
            json.dumps(document),
        )
        return secret

    def rows(self) -> str:
        """Everything that the database keeps of the account, as text; equal while it is equal."""
        tables = self.money.all(
            "SELECT c.relname FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid"
            " WHERE c.relnamespace = 'tallygate'::regnamespace AND a.attname = 'account_id'"
            " AND c.relkind IN ('r', 'p') AND NOT c.relispartition ORDER BY 1"
        )
        return "\n".join(
            f"{table}: {row}"
            for (table,) in tables
            if table not in _SHARED_TABLES
            for (row,) in self.money.all(
                f"SELECT to_jsonb(t)::text FROM {table} AS t WHERE account_id = %s ORDER BY 1",
                self.money.account_id,
            )
        )

    def marks(self) -> set[str]:
        """Every uuid that stands in the account's rows: where one is shown, the account is."""
        return set(_UUID.findall(self.rows()))


async def make_estate(url: str, call: Call) -> Estate:
    """Make an account with requests in every state, entries of every kind and a key of each role.

    `call(method, path, key=…, json=…)` sends a request to the service.
    """
    money = Money(url, funds=1000 * CREDIT, name="k")
    estate = Estate(money, call)
    for role in ("manage", "inference", "read-only"):
        estate.keys[role] = estate.new_key(role)
    money.settle(
        capture(money.hold(CREDIT), 2 * CREDIT),
        void(money.hold(CREDIT)),
        capture(money.hold(CREDIT, byok=True), 0, status="byok"),
    )
    money.hold(CREDIT)
    estate.ids["account_id"] = estate.account_id
    estate.ids["key_id"] = str(money.key_id)
    # One that there is enough to take back of.
    money.fund(CREDIT, "second")
    (grant,) = money.one(
        "SELECT request_id FROM entries WHERE account_id = %s AND kind = 'grant'"
        " ORDER BY seq DESC LIMIT 1",
        money.account_id,
    )
    estate.ids["entry_id"] = str(grant)
    return estate


async def _request(estate: Estate) -> str:
    """A request that waits for a review."""
    request = estate.money.hold(CREDIT)
    estate.money.settle(void(request, status="needs_review", review_reason="usage_missing"))
    return str(request["request_id"])


async def _version(estate: Estate) -> str:
    """A version of the price book that is to come, and like no other."""
    factor = f"2.{secrets.randbelow(10**6):06}"
    drafts, document = "/admin/v1/price-books/drafts", {"kind": "markup", "factor": factor}
    draft = await _admin(estate, drafts, {"name": "draft", "document": {"default": document}})
    body: dict[str, Any] = {"at": (datetime.now(UTC) + timedelta(days=400)).isoformat()}
    path = f"{drafts}/{draft['id']}/publish"
    answer = await estate.call("POST", path, key=ADMIN_KEY, json=body)
    if answer.status_code == 409:
        # Another is to come before it, and the refusal says which.
        body["based_on"] = answer.json()["error"]["version"]
    made = await _admin(estate, path, body)
    return str(made["version"])


async def _charge(estate: Estate) -> str:
    """A charge that is held."""
    charge = {"action": ACTION, "hold": True}
    answer = await estate.call("POST", "/api/v1/charges", key=estate.key, json=charge)
    assert answer.is_success, f"POST /api/v1/charges: {answer.status_code} {answer.text}"
    return str(answer.json()["id"])


async def _month(_estate: Estate) -> str:
    """The month that runs."""
    return f"{datetime.now(UTC):%Y-%m}"


_MAKERS: dict[str, Callable[[Estate], Awaitable[str]]] = {
    "request_id": _request,
    "version": _version,
    "charge_id": _charge,
    "month": _month,
}


async def _admin(estate: Estate, path: str, body: object) -> Any:
    answer = await estate.call("POST", path, key=ADMIN_KEY, json=body)
    assert answer.is_success, f"POST {path}: {answer.status_code} {answer.text}"
    return answer.json()
