"""Keys over HTTP: the same for customers and operators, and changes act at once everywhere."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest

from proxy.api.data_plane import DataPlane
from proxy.db import make_pool
from proxy.ids import uuid7
from proxy.key_uses import KeyUses
from tests.integration.money import Money
from tests.support.api import Api, open_api
from tests.support.service import ADMIN_KEY

pytestmark = pytest.mark.anyio

MODEL = {
    "model_name": "priced",
    "model_info": {
        "mode": "chat",
        "max_input_tokens": 8192,
        "max_output_tokens": 1024,
        "input_cost_per_token": 1e-06,
        "output_cost_per_token": 1e-05,
    },
}
BOOK = {"default": {"kind": "markup", "factor": "2.0"}}
# What a request comes to that was admitted: there is no LiteLLM behind these services.
ADMITTED = (503, "upstream_unavailable")


@dataclass
class Side:
    """Who manages an account's keys: its customer, by a key, or an operator."""

    api: Api
    account_id: str
    root: str
    key: str
    key_id: str | None

    async def send(self, method: str, path: str = "", body: object = None) -> httpx.Response:
        return await self.api.call(method, self.root + path, key=self.key, json=body)

    async def do(self, method: str, path: str = "", body: object = None) -> Any:
        answer = await self.send(method, path, body)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    async def refused(
        self, status: int, method: str, path: str = "", body: object = None
    ) -> dict[str, Any]:
        answer = await self.send(method, path, body)
        assert answer.status_code == status, answer.text
        return answer.json()["error"]


@pytest.fixture(params=["customer", "operator"])
async def side(request: pytest.FixtureRequest, api: Api) -> Side:
    """An account without credits, as each of the sides sees it."""
    account_id = await api.new_account()
    manager = await api.new_key(account_id, role="manage", name="manager")
    if request.param == "customer":
        return Side(api, account_id, "/api/v1", manager["key"], manager["id"])
    return Side(api, account_id, f"/admin/v1/accounts/{account_id}", ADMIN_KEY, None)


@pytest.fixture
async def customer(api: Api) -> Side:
    """A customer with a key that manages."""
    account_id = await api.new_account()
    made = await api.new_key(account_id, role="manage")
    return Side(api, account_id, "/api/v1", made["key"], made["id"])


SETTINGS: dict[str, Any] = {
    "role": "read-only",
    "expires_at": "2099-01-01T00:00:00Z",
    "allowed_models": ["gpt-*"],
    "allowed_endpoints": ["chat.completions", "audio.*"],
    "allowed_networks": ["192.0.2.0/24", "2001:db8::/32"],
    "requests_per_minute": 5,
    "tokens_per_minute": 100,
    "max_concurrency": 2,
    "budget": {"credits": "5", "usd": "0.005", "period": "day"},
}


def sent(settings: dict[str, Any]) -> dict[str, Any]:
    """What a customer sends to get these settings."""
    budget = {"credits": "5", "period": "day"}
    return {**settings, **({"budget": budget} if settings.get("budget") else {})}


async def test_key_has_what_it_was_made_with(side: Side) -> None:
    made = await side.do("POST", "/keys", {"name": "laptop", **sent(SETTINGS)})
    assert made["key"].startswith("sk-")
    shown = await side.do("GET", f"/keys/{made['id']}")
    assert shown == {n: v for n, v in made.items() if n not in {"key", "account_id"}}
    expected = {
        **SETTINGS,
        "name": "laptop",
        "project_id": None,
        "last_used_at": None,
        "replaced_by": None,
        "budget_left": {"credits": "5", "usd": "0.005"},
    }
    assert {name: shown[name] for name in expected} == expected
    assert (await side.do("GET", "/keys"))["data"][0] == shown


async def test_change_leaves_what_is_left_out_and_null_takes_a_limit_away(side: Side) -> None:
    made = await side.do("POST", "/keys", {"name": "laptop", **sent(SETTINGS)})
    path = f"/keys/{made['id']}"
    renamed = await side.do("PATCH", path, {"name": "desktop"})
    assert renamed["name"] == "desktop"
    assert {name: renamed[name] for name in SETTINGS} == SETTINGS
    nothing = dict.fromkeys(SETTINGS.keys() - {"role"})
    freed = await side.do("PATCH", path, nothing)
    assert {name: freed[name] for name in nothing} == nothing
    assert (freed["role"], freed["budget_left"]) == ("read-only", None)
    assert await side.do("PATCH", path, sent(SETTINGS)) == renamed
    assert await side.do("PATCH", path, {}) == renamed


@pytest.mark.parametrize(
    "change, param",
    [
        ({"name": None}, "name"),
        ({"name": ""}, "name"),
        ({"role": None}, "role"),
        ({"role": "owner"}, "role"),
        ({"project_id": "north"}, "project_id"),
        ({"allowed_endpoints": ["chat completions"]}, "allowed_endpoints.0"),
        ({"allowed_endpoints": ["chat"]}, "allowed_endpoints.0"),
        ({"allowed_endpoints": []}, "allowed_endpoints"),
        ({"allowed_networks": ["192.0.2.1/24"]}, "allowed_networks.0"),
        ({"allowed_networks": ["fe80::%eth0/64"]}, "allowed_networks.0"),
        ({"allowed_networks": ["everywhere"]}, "allowed_networks.0"),
        ({"allowed_networks": ["0\x00"]}, "allowed_networks.0"),
        ({"allowed_networks": [3221225985]}, "allowed_networks.0"),
        ({"budget": {"credits": "-1"}}, "budget.credits"),
        ({"status": "active"}, "status"),
    ],
)
async def test_change_that_makes_no_sense_is_400_and_names_the_field(
    customer: Side, change: dict[str, object], param: str
) -> None:
    error = await customer.refused(400, "PATCH", f"/keys/{customer.key_id}", change)
    assert error["param"] == param


async def test_keys_that_there_are_not_are_404(side: Side) -> None:
    foreign = await side.api.new_key(await side.api.new_account())
    for key_id in (foreign["id"], str(uuid7()), "nothing"):
        path = f"/keys/{key_id}"
        for method, end, body in (
            ("GET", "", None),
            ("PATCH", "", {"name": "mine"}),
            ("POST", "/rotate", {}),
            ("DELETE", "", None),
        ):
            error = await side.refused(404, method, path + end, body)
            assert "no key" in error["message"]
    foreign_root = f"/admin/v1/accounts/{foreign['account_id']}/keys/{foreign['id']}"
    answer = await side.api.call("GET", foreign_root, key=ADMIN_KEY)
    assert (answer.json()["name"], answer.json()["status"]) == ("key", "active")


async def test_only_keys_that_manage_change_keys(customer: Side) -> None:
    for role in ("inference", "read-only"):
        made = await customer.do("POST", "/keys", {"name": role, "role": role})
        other = Side(customer.api, customer.account_id, "/api/v1", made["key"], made["id"])
        assert (await other.do("GET", "/keys"))["data"]
        for method, path, body in (
            ("POST", "/keys", {"name": "more", "role": "manage"}),
            ("PATCH", f"/keys/{made['id']}", {"role": "manage"}),
            ("POST", f"/keys/{made['id']}/rotate", {}),
            ("DELETE", f"/keys/{customer.key_id}", None),
            ("POST", "/projects", {"name": "p"}),
        ):
            error = await other.refused(403, method, path, body)
            assert error["code"] == "permission_denied"
            assert "manage" in error["message"]


async def test_key_does_not_lock_its_account_out_by_a_slip(customer: Side) -> None:
    api = customer.api
    project = await customer.do("POST", "/projects", {"name": "p"})
    await customer.do("PATCH", f"/keys/{customer.key_id}", {"project_id": project["id"]})
    own = f"/keys/{customer.key_id}"
    slips: list[tuple[str, str, object]] = [
        ("PATCH", own, {"role": "inference"}),
        ("PATCH", own, {"expires_at": "2099-01-01T00:00:00Z"}),
        ("PATCH", own, {"allowed_networks": ["192.0.2.0/24"]}),
        ("POST", own + "/rotate", {}),
        ("POST", f"/projects/{project['id']}/archive", None),
        ("DELETE", own, None),
    ]
    for method, path, body in slips:
        for query in ("", "?self=false"):
            error = await customer.refused(409, method, path + query, body)
            assert (error["code"], "?self=true" in error["message"]) == ("own_key", True)
        assert (await customer.refused(400, method, path + "?self=yes", body))["param"] == "self"
    harmless = {"role": "manage", "expires_at": None, "allowed_networks": None, "name": "me"}
    await customer.do("PATCH", own, harmless)
    assert (await customer.do("GET", own))["status"] == "active"
    await customer.do("DELETE", own + "?self=true")
    assert (await api.call("GET", "/api/v1/keys", key=customer.key)).status_code == 401


async def test_rotation_puts_a_like_key_in_the_place_of_one_that_goes_on_for_a_while(
    side: Side,
) -> None:
    api = side.api
    settings = {**SETTINGS, "allowed_networks": None}
    old = await side.do("POST", "/keys", {"name": "laptop", **sent(settings)})
    new = await side.do("POST", f"/keys/{old['id']}/rotate", {"overlap_s": 3600})
    assert new["key"] != old["key"]
    same = {"name", "project_id", *settings}
    assert {name: new[name] for name in same} == {name: old[name] for name in same}
    for key in (old["key"], new["key"]):
        assert (await api.call("GET", "/api/v1/balance", key=key)).status_code == 200
    shown = await side.do("GET", f"/keys/{old['id']}")
    assert (shown["replaced_by"], shown["status"]) == (new["id"], "active")
    assert shown["expires_at"] < settings["expires_at"]
    error = await side.refused(409, "POST", f"/keys/{old['id']}/rotate", {})
    assert "Rotate that one" in error["message"]

    await side.do("POST", f"/keys/{new['id']}/rotate", {})
    assert (await api.call("GET", "/api/v1/balance", key=new["key"])).status_code == 401
    error = await side.refused(409, "POST", f"/keys/{new['id']}/rotate", {})
    assert "revoked" in error["message"]
    for overlap_s in (-1, 7 * 86_400 + 1, 1.5, "1"):
        error = await side.refused(
            400, "POST", f"/keys/{old['id']}/rotate", {"overlap_s": overlap_s}
        )
        assert error["param"] == "overlap_s"


async def test_overlap_ends(api: Api, database_url: str) -> None:
    key = await api.new_key(await api.new_account())
    path = f"/accounts/{key['account_id']}/keys/{key['id']}"
    await api.admin("POST", path + "/rotate", {"overlap_s": 60})
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "UPDATE tallygate.virtual_keys SET expires_at = expires_at - interval '1 minute'"
            " WHERE key_id = %s",
            (key["id"],),
        )
    error = await api.refused("GET", "/api/v1/balance", 403, key=key["key"])
    assert error["code"] == "key_expired"
    error = await api.refused("POST", f"/admin/v1{path}/rotate", 409, json={})
    assert "Rotate that one" in error["message"]


async def test_revoked_key_is_changed_no_more(side: Side) -> None:
    made = await side.do("POST", "/keys", {"name": "k"})
    await side.do("DELETE", f"/keys/{made['id']}")
    error = await side.refused(409, "PATCH", f"/keys/{made['id']}", {"name": "n"})
    assert "revoked" in error["message"]


async def test_audit_trail_names_who_did_it(side: Side) -> None:
    made = await side.do("POST", "/keys", {"name": "k"})
    await side.do("PATCH", f"/keys/{made['id']}", {"max_concurrency": 3})
    await side.do("POST", f"/keys/{made['id']}/rotate", {"overlap_s": 5})
    await side.do("DELETE", f"/keys/{made['id']}")
    events = (await side.api.admin("GET", "/audit-trail"))["data"][:4]
    who = "admin" if side.key_id is None else f"key:{side.key_id}"
    assert [(event["action"], event["actor"]) for event in reversed(events)] == [
        (action, who) for action in ("key.create", "key.update", "key.rotate", "key.revoke")
    ]


async def test_last_use_is_written_in_the_background(customer: Side) -> None:
    api = customer.api
    made = await customer.do("POST", "/keys", {"name": "k"})
    path = f"/keys/{made['id']}"
    assert (await api.call("GET", "/api/v1/balance", key=made["key"])).status_code == 200
    assert (await customer.do("GET", path))["last_used_at"] is None
    await api.key_uses.flush()
    shown = await customer.do("GET", path)
    assert shown["last_used_at"] >= shown["created_at"]
    assert (await customer.do("GET", "/keys"))["data"][0] == shown
    await api.key_uses.flush()
    assert await customer.do("GET", path) == shown, "it was not used since"


async def test_uses_that_can_not_be_written_wait_for_the_next_time(
    customer: Side,
) -> None:
    await customer.do("GET", "/keys")
    seen = dict(customer.api.key_uses.seen)
    uses = KeyUses(make_pool("postgresql://127.0.0.1:1/none"))  # and it is not open
    uses.seen.update(seen)
    await uses.flush()
    assert uses.seen == seen != {}


async def test_oversight_finds_whose_a_key_is(api: Api) -> None:
    made = [await api.new_key(await api.new_account(), name=f"k{n}") for n in range(3)]
    await api.admin("DELETE", f"/accounts/{made[0]['account_id']}/keys/{made[0]['id']}")
    listed = (await api.admin("GET", "/keys"))["data"]
    assert [(key["id"], key["account_id"]) for key in listed] == [
        (key["id"], key["account_id"]) for key in reversed(made)
    ]
    prefix = made[1]["key"][:8]
    found = (await api.admin("GET", "/keys", params={"prefix": prefix}))["data"]
    assert made[1]["id"] in {key["id"] for key in found}
    assert all(key["prefix"].startswith(prefix) for key in found)
    (revoked,) = (await api.admin("GET", "/keys", params={"status": "revoked"}))["data"]
    assert revoked["id"] == made[0]["id"]
    page = await api.admin("GET", "/keys", params={"limit": 2, "status": "active"})
    assert (len(page["data"]), page["next_cursor"]) == (2, None)
    page = await api.admin("GET", "/keys", params={"limit": 2})
    rest = await api.admin("GET", "/keys", params={"cursor": page["next_cursor"]})
    assert [key["id"] for key in rest["data"]] == [made[0]["id"]]
    for params in ({"prefix": made[1]["key"]}, {"prefix": "\x00"}, {"status": "gone"}):
        await api.refused("GET", "/admin/v1/keys", 400, params=params)


# --- projects ---


async def test_project_is_made_changed_and_archived(side: Side) -> None:
    budget = {"credits": "7", "period": "month"}
    made = await side.do("POST", "/projects", {"name": "north", "budget": budget})
    shown = {**budget, "usd": "0.007"}
    assert (made["budget"], made["budget_left"]["credits"]) == (shown, "7")
    path = f"/projects/{made['id']}"
    renamed = await side.do("PATCH", path, {"name": "south"})
    assert renamed == {**made, "name": "south"} == await side.do("GET", path)
    assert (await side.do("PATCH", path, {"budget": None}))["budget"] is None
    key = await side.do("POST", "/keys", {"name": "k", "project_id": made["id"]})
    other = await side.do("POST", "/keys", {"name": "other"})
    (listed,) = (await side.do("GET", f"/keys?project_id={made['id']}"))["data"]
    assert (listed["id"], listed["project_id"]) == (key["id"], made["id"])

    archived = await side.do("POST", path + "/archive")
    assert (archived["status"], archived["name"]) == ("archived", "south")
    assert await side.do("POST", path + "/archive") == archived
    assert (await side.do("GET", "/projects"))["data"] == [archived]
    api = side.api
    assert (await api.call("GET", "/api/v1/balance", key=key["key"])).status_code == 401
    assert (await api.call("GET", "/api/v1/balance", key=other["key"])).status_code == 200
    for method, target, body in (
        ("PATCH", path, {"name": "west"}),
        ("POST", "/keys", {"name": "k", "project_id": made["id"]}),
        ("PATCH", f"/keys/{other['id']}", {"project_id": made["id"]}),
    ):
        assert "archived" in (await side.refused(409, method, target, body))["message"]


async def test_projects_that_there_are_not_are_404(side: Side) -> None:
    api, other = side.api, await side.api.new_account()
    foreign = await api.admin("POST", f"/accounts/{other}/projects", {"name": "theirs"})
    key = await side.do("POST", "/keys", {"name": "k"})
    for project_id in (foreign["id"], str(uuid7())):
        path = f"/projects/{project_id}"
        await side.refused(404, "GET", path)
        await side.refused(404, "PATCH", path, {"name": "mine"})
        await side.refused(404, "POST", path + "/archive")
        for method, target in (("POST", "/keys"), ("PATCH", f"/keys/{key['id']}")):
            body = {"name": "k", "project_id": project_id}
            error = await side.refused(404, method, target, body)
            assert error["param"] == "project_id"
        assert (await side.do("GET", f"/keys?project_id={project_id}"))["data"] == []
    await side.refused(404, "GET", "/projects/nothing")
    await side.refused(400, "GET", "/keys?project_id=nothing")
    assert await api.admin("GET", f"/accounts/{other}/projects/{foreign['id']}") == foreign


async def test_closed_account_gets_no_more_keys_or_projects(api: Api, database_url: str) -> None:
    account_id = await api.new_account()
    key = await api.new_key(account_id)
    with psycopg.connect(database_url) as connection:
        connection.execute("UPDATE tallygate.accounts SET status = 'closed'")
    root = f"/admin/v1/accounts/{account_id}"
    for path in ("/keys", "/projects", f"/keys/{key['id']}/rotate"):
        body = {} if path.endswith("rotate") else {"name": "n"}
        assert "closed" in (await api.refused("POST", root + path, 409, json=body))["message"]


# --- every change acts on the next request of every replica ---


@dataclass
class Replica:
    """One of several services on the same database."""

    api: Api
    data_plane: DataPlane

    async def chat(
        self, key: str, *, peer: str = "192.0.2.7", forwarded_for: str | None = None
    ) -> tuple[int, str]:
        """Ask for a chat completion; the status and code of what it comes to."""
        headers = {"authorization": f"Bearer {key}"}
        if forwarded_for is not None:
            headers["x-forwarded-for"] = forwarded_for
        transport = httpx.ASGITransport(self.data_plane, client=(peer, 50_000))
        body = {"model": "priced", "messages": [{"role": "user", "content": "hi"}]}
        async with httpx.AsyncClient(transport=transport, base_url="http://tallygate") as client:
            answer = await client.post("/v1/chat/completions", headers=headers, json=body)
        return answer.status_code, answer.json()["error"]["code"]


async def make_replica(api: Api) -> Replica:
    await api.services.price_books.refresh()
    api.services.catalog.load_cache()
    return Replica(api, DataPlane(api.services))


@pytest.fixture
async def replicas(database_url: str, tmp_path: Path) -> AsyncIterator[tuple[Replica, Replica]]:
    """Two replicas behind a proxy at 10.0.0.1, whose copies of keys would last a minute."""
    with psycopg.connect(database_url) as connection:
        connection.execute("SET search_path = tallygate")
        connection.execute(
            "SELECT publish_price_book(%s, 1000000, %s, 'test')", (json.dumps(BOOK), uuid7())
        )
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "catalog.json").write_text(json.dumps([MODEL]))
    settings = {"trusted_proxies": ["10.0.0.1/32"], "litellm_url": "http://127.0.0.1:1"}
    async with (
        open_api(database_url, tmp_path / "a", **settings) as a,
        open_api(database_url, tmp_path / "b", **settings) as b,
    ):
        yield await make_replica(a), await make_replica(b)


CHANGES: list[tuple[dict[str, Any], tuple[int, str]]] = [
    ({"role": "read-only"}, (403, "permission_denied")),
    ({"allowed_models": ["gpt-*"]}, (403, "model_not_allowed")),
    ({"allowed_endpoints": ["audio.*", "embeddings"]}, (403, "endpoint_not_allowed")),
    ({"allowed_networks": ["198.51.100.0/24"]}, (403, "network_not_allowed")),
    ({"budget": {"credits": "0.000001"}}, (402, "budget_exceeded")),
    ({"tokens_per_minute": 1}, (429, "rate_limit_exceeded")),
]


async def test_every_limit_acts_on_the_next_request_of_every_replica(
    replicas: tuple[Replica, Replica],
) -> None:
    here, there = replicas
    account_id = await here.api.new_account(credits="1000")
    for change, refusal in CHANGES:
        made = await here.api.new_key(account_id)
        path, key = f"/accounts/{account_id}/keys/{made['id']}", made["key"]
        assert await there.chat(key) == await here.chat(key) == ADMITTED, change
        await here.api.admin("PATCH", path, change)
        for _ in range(2):  # by a copy that is outdated, and by one that is not
            assert await there.chat(key) == await here.chat(key) == refusal, change
        back = {"role": "inference"} if "role" in change else dict.fromkeys(change)
        await there.api.admin("PATCH", path, back)
        assert await here.chat(key) == await there.chat(key) == ADMITTED, change
        await there.api.admin("DELETE", path)
        assert await here.chat(key) == await there.chat(key) == (401, "invalid_api_key")


async def test_requests_per_minute_and_concurrency_count_over_all_replicas(
    replicas: tuple[Replica, Replica], database_url: str
) -> None:
    here, there = replicas
    account_id = await here.api.new_account(credits="1000")
    made = await here.api.new_key(account_id, requests_per_minute=1)
    outcomes = await asyncio.gather(*(one.chat(made["key"]) for one in (here, there) * 3))
    # The minute may end while they are under way.
    assert outcomes.count(ADMITTED) in {1, 2}
    assert set(outcomes) == {ADMITTED, (429, "rate_limit_exceeded")}

    one = await here.api.new_key(account_id, max_concurrency=1)
    money = Money(database_url)
    money.account_id, money.key_id = UUID(account_id), UUID(one["id"])
    money.hold(1)
    assert await there.chat(one["key"]) == (429, "rate_limit_exceeded")
    await there.api.admin(
        "PATCH", f"/accounts/{account_id}/keys/{one['id']}", {"max_concurrency": 2}
    )
    assert await here.chat(one["key"]) == ADMITTED
    money.connection.close()


async def test_networks_are_those_of_the_client_behind_our_own_proxies(
    replicas: tuple[Replica, Replica],
) -> None:
    here, _ = replicas
    account_id = await here.api.new_account(credits="1000")
    networks = ["198.51.100.0/24", "2001:db8::/32"]
    key = (await here.api.new_key(account_id, allowed_networks=networks))["key"]
    refused = (403, "network_not_allowed")
    inside, outside, proxy = "198.51.100.9", "203.0.113.5", "10.0.0.1"

    assert await here.chat(key, peer=inside) == ADMITTED
    assert await here.chat(key, peer="::ffff:198.51.100.9") == ADMITTED
    assert await here.chat(key, peer="2001:db8::1") == ADMITTED
    assert await here.chat(key, peer=outside) == refused
    # What a stranger says of itself counts for nothing, nor what it puts before our proxy's word.
    assert await here.chat(key, peer=outside, forwarded_for=inside) == refused
    assert await here.chat(key, peer=proxy, forwarded_for=f"{inside}, {outside}") == refused
    assert await here.chat(key, peer=proxy, forwarded_for=inside) == ADMITTED
    assert await here.chat(key, peer=proxy) == refused
    # The account API keeps to it as well.
    answer = await here.api.on(outside).call("GET", "/api/v1/balance", key=key)
    assert (answer.status_code, answer.json()["error"]["code"]) == refused


async def test_project_acts_on_the_next_request_of_every_replica(
    replicas: tuple[Replica, Replica],
) -> None:
    here, there = replicas
    account_id = await here.api.new_account(credits="1000")
    root = f"/accounts/{account_id}"
    project = await here.api.admin("POST", root + "/projects", {"name": "p"})
    path = f"{root}/projects/{project['id']}"
    made = await here.api.new_key(account_id)
    assert await there.chat(made["key"]) == ADMITTED
    await here.api.admin("PATCH", path, {"budget": {"credits": "0.000001"}})
    assert await there.chat(made["key"]) == ADMITTED
    await here.api.admin("PATCH", f"{root}/keys/{made['id']}", {"project_id": project["id"]})
    assert await there.chat(made["key"]) == (402, "project_budget_exceeded")
    await here.api.admin("PATCH", path, {"budget": None})
    assert await there.chat(made["key"]) == ADMITTED
    usage = await here.api.admin("GET", root + "/usage")
    assert usage["data"][0]["project_id"] == project["id"]
    await there.api.admin("POST", path + "/archive")
    assert await here.chat(made["key"]) == await there.chat(made["key"]) == (401, "invalid_api_key")
