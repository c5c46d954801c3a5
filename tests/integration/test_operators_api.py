"""Operators: their keys and roles, accounts found and stopped, models switched off, the trail."""

from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psycopg
import pytest

from proxy import directory, trail
from proxy.api.admin import AdminApi
from proxy.api.openapi import path_names
from proxy.ids import uuid7
from proxy.operators import ROLES
from tests.integration.money import Money, capture
from tests.support.api import Api, open_api
from tests.support.service import ADMIN_KEY

pytestmark = pytest.mark.anyio

ADMIN = "/admin/v1"


@pytest.fixture
async def replica(api: Api, database_url: str, tmp_path: Path) -> AsyncIterator[Api]:
    """Another process's services on the same database."""
    del api
    home = tmp_path / "replica"
    home.mkdir()
    async with open_api(database_url, home) as opened:
        yield opened


@pytest.fixture
def money(api: Api, database_url: str) -> Iterator[Money]:
    """An account of the same database, over SQL."""
    del api
    opened = Money(database_url, funds=1000)
    yield opened
    opened.connection.close()


async def _admin_key(api: Api, role: str, name: str | None = None, **body: object) -> str:
    made = await api.admin("POST", "/admin-keys", {"name": name or role, "role": role, **body})
    return made["key"]


async def _acts(api: Api, **filters: str) -> list[dict[str, Any]]:
    return (await api.admin("GET", "/audit-trail", params=filters))["data"]


# --- admin keys ---


async def test_admin_key_is_shown_once_and_stored_as_its_hash(api: Api, database_url: str) -> None:
    made = await api.admin("POST", "/admin-keys", {"name": "Ada", "role": "finance"})
    assert set(made) == {"id", "name", "role", "expires_at", "key"}
    assert made["key"].startswith("tga-")
    assert len(made["key"]) > 40
    (shown,) = (await api.admin("GET", "/admin-keys"))["data"]
    assert made["key"] not in str(shown)
    assert made["key"].startswith(shown["prefix"])
    assert (shown["name"], shown["role"], shown["status"]) == ("Ada", "finance", "active")
    assert (shown["created_by"], shown["last_used_at"]) == ("admin", None)
    with psycopg.connect(database_url) as connection:
        rows = connection.execute(
            "SELECT k::text, t::text FROM tallygate.admin_keys AS k, tallygate.audit_trail AS t"
        ).fetchall()
    assert rows
    assert made["key"] not in str(rows)


async def test_key_acts_under_its_name_and_says_when_it_was_used(api: Api) -> None:
    key = await _admin_key(api, "support", "Grace")
    answer = await api.call("POST", f"{ADMIN}/accounts", key=key, json={"name": "customer"})
    assert answer.status_code == 201
    act, _ = await _acts(api)
    assert (act["actor"], act["action"]) == ("Grace", "account.create")
    (shown,) = (await api.admin("GET", "/admin-keys"))["data"]
    used = datetime.fromisoformat(shown["last_used_at"])
    assert abs(used - datetime.now(UTC)) < timedelta(minutes=1)


async def test_every_operation_is_open_to_the_roles_that_it_names_and_to_no_other(api: Api) -> None:
    keys = {role: await _admin_key(api, role) for role in ROLES}
    for operation in AdminApi(api.services).operations():
        path = operation.path
        for name in path_names(path):
            # Nobody's: what may be done is done to nothing.
            path = path.replace(f"{{{name}}}", str(uuid7()))
        for role, key in keys.items():
            # An empty body is no body of any operation that changes something by one.
            answer = await api.call(operation.method, path, key=key, json=[])
            may = operation.needs in ROLES[role]
            is_refused = answer.status_code == 403
            assert is_refused is not may, (operation.method, operation.path, role, answer.text)


async def test_revoked_key_is_refused_on_the_next_call_of_another_replica(
    api: Api, replica: Api
) -> None:
    key = await _admin_key(api, "owner", "Ada")
    assert (await replica.call("GET", f"{ADMIN}/accounts", key=key)).status_code == 200
    (shown,) = (await api.admin("GET", "/admin-keys"))["data"]
    # An owner may revoke itself.
    path = f"{ADMIN}/admin-keys/{shown['id']}"
    assert (await api.call("DELETE", path, key=key)).status_code == 204
    error = await replica.refused("GET", f"{ADMIN}/accounts", 403, key=key)
    assert (error["code"], "revoked" in error["message"]) == ("admin_only", True)
    assert await api.admin("DELETE", f"/admin-keys/{shown['id']}") is None
    await api.refused("DELETE", f"{ADMIN}/admin-keys/{uuid7()}", 404)
    await api.refused("DELETE", f"{ADMIN}/admin-keys/x", 404)
    acts = [(act["actor"], act["action"]) for act in await _acts(api)]
    assert acts == [("Ada", "admin_key.revoke"), ("admin", "admin_key.create")]
    (shown,) = (await api.admin("GET", "/admin-keys"))["data"]
    assert (shown["status"], shown["revoked_at"] is None) == ("revoked", False)


async def test_expired_key_is_refused(api: Api, money: Money) -> None:
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    key = await _admin_key(api, "owner", expires_at=soon)
    assert (await api.call("GET", f"{ADMIN}/accounts", key=key)).status_code == 200
    money.connection.execute("UPDATE admin_keys SET expires_at = now()")
    error = await api.refused("GET", f"{ADMIN}/accounts", 403, key=key)
    assert error["code"] == "key_expired"


async def test_name_is_one_keys_at_a_time(api: Api) -> None:
    await _admin_key(api, "support", "Ada")
    body = {"name": "Ada", "role": "read-only"}
    error = await api.refused("POST", f"{ADMIN}/admin-keys", 409, json=body)
    assert error["param"] == "name"
    (shown,) = (await api.admin("GET", "/admin-keys"))["data"]
    await api.admin("DELETE", f"/admin-keys/{shown['id']}")
    await _admin_key(api, "read-only", "Ada")


async def test_name_that_would_mislead_is_refused(api: Api) -> None:
    for name in ("admin", "key:1", "", " ", "\x00", "a" * 65):
        body = {"name": name, "role": "owner"}
        error = await api.refused("POST", f"{ADMIN}/admin-keys", 400, json=body)
        assert error["param"] == "name", name


async def test_without_the_key_of_the_settings_no_other_opens_the_api(api: Api) -> None:
    key = await _admin_key(api, "owner")
    closed = api.with_(admin_key=None)
    assert (await closed.refused("GET", f"{ADMIN}/accounts", 403, key=key))["code"] == "admin_only"


# --- accounts ---

_SEARCHES: list[tuple[dict[str, str], list[str]]] = [
    ({"name": "love"}, ["Ada Lovelace"]),
    ({"name": "LOVE"}, ["Ada Lovelace"]),
    ({"name": "a"}, ["Grace Hopper", "Ada Lovelace"]),
    ({"name": "ö"}, ["ÄÖÜ & Söhne"]),
    ({"name": "%"}, ["100 % GmbH"]),
    ({"name": "nobody"}, []),
    ({"tier": "gold"}, ["Grace Hopper"]),
    ({"status": "suspended"}, ["ÄÖÜ & Söhne"]),
    ({"min_balance": "10"}, ["Grace Hopper"]),
    ({"min_balance": "0.000001", "max_balance": "10"}, ["Grace Hopper"]),
    ({"max_balance": "9.999999"}, ["ÄÖÜ & Söhne", "100 % GmbH", "Ada Lovelace"]),
    ({"name": "a", "tier": "gold", "status": "active"}, ["Grace Hopper"]),
]
_NONSENSE = {
    "status": ["odd"],
    "name": ["\x00", "", "a" * 300],
    "min_balance": ["many", "-" + "9" * 40],
    "max_balance": ["1e400"],
}


async def test_accounts_are_found_by_what_is_known_of_them(api: Api) -> None:
    await api.new_account(name="Ada Lovelace")
    await api.new_account(name="100 % GmbH")
    suspended = await api.new_account(name="ÄÖÜ & Söhne")
    await api.new_account(name="Grace Hopper", tier="gold", credits="10")
    await api.admin("POST", f"/accounts/{suspended}/suspend", {"reason": "r"})
    for filters, found in _SEARCHES:
        page = await api.admin("GET", "/accounts", params=filters)
        assert [account["name"] for account in page["data"]] == found, filters
        assert page["next_cursor"] is None


async def test_account_is_found_by_the_prefix_of_a_key_and_never_by_more_of_it(api: Api) -> None:
    account_id = await api.new_account()
    await api.new_account()
    key = (await api.new_key(account_id))["key"]
    page = await api.admin("GET", "/accounts", params={"key_prefix": key[:10]})
    assert [account["id"] for account in page["data"]] == [account_id]
    for sent in (key, key[:9]):
        error = await api.refused("GET", f"{ADMIN}/accounts", 400, params={"key_prefix": sent})
        assert (error["param"], key in error["message"]) == ("key_prefix", False)


async def test_filter_that_makes_no_sense_is_named(api: Api) -> None:
    for name, texts in _NONSENSE.items():
        for text in texts:
            path = f"{ADMIN}/accounts?{urlencode({name: text})}"
            assert (await api.refused("GET", path, 400))["param"] == name, text


async def test_search_looks_at_so_many_accounts_a_page_and_goes_on(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "_SCANNED_ACCOUNTS", 3)
    oldest = await api.new_account(name="wanted", tier="gold")
    for _ in range(7):
        await api.new_account(name="another")
    cursor, pages = None, list[list[str]]()
    while True:
        params = {"tier": "gold"} | ({"cursor": cursor} if cursor else {})
        page = await api.admin("GET", "/accounts", params=params)
        pages.append([account["id"] for account in page["data"]])
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert pages == [[], [], [oldest]]


async def test_names_are_found_by_their_index_among_many(money: Money) -> None:
    money.connection.execute(
        "INSERT INTO accounts (account_id, name, tier)"
        " SELECT gen_random_uuid(), 'customer ' || md5(n::text), 'default'"
        " FROM generate_series(1, 5000) AS n"
    )
    money.connection.execute("ANALYZE accounts")
    plan = money.connection.execute(
        "EXPLAIN SELECT 1 FROM accounts AS a WHERE name_trigrams(a.name) @> name_trigrams('a1b2c3')"
    ).fetchall()
    assert "accounts_by_name" in str(plan)


async def test_account_tells_what_there_is_to_know(api: Api, money: Money) -> None:
    account_id = await api.new_account(credits="10")
    gone = await api.new_key(account_id)
    await api.new_key(account_id)
    await api.admin("DELETE", f"/accounts/{account_id}/keys/{gone['id']}")
    shown = await api.admin("GET", f"/accounts/{account_id}")
    assert (shown["active_keys"], shown["all_keys"], shown["last_request_at"]) == (1, 2, None)
    held = money.hold(1)
    pending = await api.admin("GET", f"/accounts/{money.account_id}")
    assert pending["last_request_at"] is not None
    money.settle(capture(held, 1))
    ended = await api.admin("GET", f"/accounts/{money.account_id}")
    assert ended["last_request_at"] == pending["last_request_at"]


async def test_account_is_renamed_and_the_trail_says_so(api: Api) -> None:
    account_id = await api.new_account(name="Ada")
    path = f"/accounts/{account_id}"
    assert (await api.admin("PATCH", path, {"name": "Grace"}))["name"] == "Grace"
    assert (await api.admin("PATCH", path, {"name": "Grace"}))["name"] == "Grace"
    (act,) = await _acts(api, action="account.rename")
    assert act["detail"] == {"name": "Grace", "before": "Ada"}
    (found,) = (await api.admin("GET", "/accounts", params={"name": "grac"}))["data"]
    assert found["id"] == account_id
    await api.refused("PATCH", ADMIN + path, 400, json={"name": ""})


async def test_suspended_account_is_refused_on_another_replica_until_it_is_resumed(
    api: Api, replica: Api
) -> None:
    account_id = await api.new_account()
    key = (await api.new_key(account_id))["key"]
    assert (await replica.call("GET", "/api/v1/balance", key=key)).status_code == 200

    body = {"reason": "chargeback"}
    for _ in range(2):
        shown = await api.admin("POST", f"/accounts/{account_id}/suspend", body)
        assert (shown["id"], shown["status"]) == (account_id, "suspended")
    error = await replica.refused("GET", "/api/v1/balance", 403, key=key)
    assert error["code"] == "account_suspended"
    assert "chargeback" not in error["message"]
    detail = await api.admin("GET", f"/accounts/{account_id}")
    assert detail["status_reason"] == "chargeback"

    assert (await api.admin("POST", f"/accounts/{account_id}/resume"))["status"] == "active"
    assert (await replica.call("GET", "/api/v1/balance", key=key)).status_code == 200
    acts = [act for act in await _acts(api, account_id=account_id) if "status" not in act["action"]]
    assert [act["action"] for act in acts[:2]] == ["account.resume", "account.suspend"]
    assert acts[1]["detail"]["reason"] == "chargeback"
    assert (await api.admin("GET", f"/accounts/{account_id}"))["status_reason"] is None


async def test_closed_account_keeps_its_balance_and_loses_its_keys_for_good(api: Api) -> None:
    account_id = await api.new_account(credits="10")
    key = (await api.new_key(account_id))["key"]
    path = f"/accounts/{account_id}"
    shown = await api.admin("POST", f"{path}/close", {"reason": "asked for"})
    assert (shown["status"], shown["balance"]["posted"]["credits"]) == ("closed", "10")
    assert (await api.call("GET", "/api/v1/balance", key=key)).status_code == 401
    detail = await api.admin("GET", path)
    assert (detail["active_keys"], detail["status_reason"]) == (0, "asked for")
    for act in ("suspend", "resume"):
        body = {"reason": "r"} if act == "suspend" else None
        error = await api.refused("POST", f"{ADMIN}{path}/{act}", 409, json=body)
        assert error["code"] == "account_closed"
    await api.admin("POST", f"{path}/close", {"reason": "again"})
    assert (await api.admin("GET", path))["status_reason"] == "asked for"


async def test_open_holds_of_a_closed_account_end_as_they_do(api: Api, money: Money) -> None:
    held = money.hold(400)
    await api.admin("POST", f"/accounts/{money.account_id}/close", {"reason": "r"})
    assert money.settle(capture(held, 150)) == ["captured"]


async def test_reason_is_asked_for(api: Api) -> None:
    account_id = await api.new_account()
    for act in ("suspend", "close"):
        bodies: list[object] = [{}, {"reason": ""}, {"reason": "\x00"}, {"reason": 1}, []]
        for body in bodies:
            await api.refused("POST", f"{ADMIN}/accounts/{account_id}/{act}", 400, json=body)
        await api.refused("POST", f"{ADMIN}/accounts/{uuid7()}/{act}", 404, json={"reason": "r"})


# --- models ---


async def test_switch_is_made_listed_and_taken_back(api: Api) -> None:
    body = {"model": "gpt-4o*", "reason": "it makes things up"}
    made = await api.admin("POST", "/model-switches", body)
    assert made == {
        "id": made["id"], "model": "gpt-4o*", "provider": None, "reason": "it makes things up",
        "switched_by": "admin", "switched_at": made["switched_at"],
    }  # fmt: skip
    assert await api.admin("POST", "/model-switches", {**body, "reason": "again"}) == made
    other = await api.admin("POST", "/model-switches", {"provider": "openai", "reason": "down"})
    assert (other["model"], other["provider"]) == (None, "openai")
    page = await api.admin("GET", "/model-switches")
    assert page == {"data": [other, made], "next_cursor": None}
    await api.admin("DELETE", f"/model-switches/{made['id']}")
    await api.refused("DELETE", f"{ADMIN}/model-switches/{made['id']}", 404)
    assert (await api.admin("GET", "/model-switches"))["data"] == [other]
    acts = [(act["action"], act["detail"]) for act in await _acts(api)]
    assert acts == [
        ("models.on", {"model": "gpt-4o*"}),
        ("models.off", {"provider": "openai", "reason": "down"}),
        ("models.off", {"model": "gpt-4o*", "reason": "it makes things up"}),
    ]


async def test_switch_of_nothing_or_of_two_things_is_refused(api: Api) -> None:
    for body in ({}, {"model": "a", "provider": "b"}, {"model": ""}, {"model": "a", "reason": ""}):
        await api.refused("POST", f"{ADMIN}/model-switches", 400, json={"reason": "r", **body})


def _ask(money: Money, models_version: int) -> list[str]:
    return money.authorize(money.request(0, version=money.version + models_version))


async def test_copy_of_the_switches_that_is_outdated_is_found_out_by_the_ledger(
    api: Api, replica: Api, money: Money
) -> None:
    before = await replica.services.switches.refresh()
    assert _ask(money, before.version) == ["held"]
    made = await api.admin("POST", "/model-switches", {"model": "gpt*", "reason": "r"})
    assert _ask(money, before.version) == ["stale"]
    after = await replica.services.switches.refresh()
    assert after.find("gpt-4o", ()) is not None
    assert after.find("claude", ()) is None
    assert _ask(money, after.version) == ["held"]
    # What no key asks for is no call of a model.
    charge = money.request(0, key_id=str(money.account_id), version=1)
    assert money.authorize(charge) == ["held"]
    await api.admin("DELETE", f"/model-switches/{made['id']}")
    assert _ask(money, after.version) == ["stale"]


# --- the trail ---


@pytest.fixture
async def two_actors(api: Api) -> Callable[..., Any]:
    """Acts of two operators on two accounts."""
    key = await _admin_key(api, "support", "Grace")
    account_id = await api.new_account()
    await api.call("POST", f"{ADMIN}/accounts", key=key, json={"name": "other"})
    await api.admin("POST", f"/accounts/{account_id}/suspend", {"reason": "r"})

    async def found(**filters: str) -> list[str]:
        acts = await _acts(api, **filters)
        return [f"{act['actor']} {act['action']}" for act in acts]

    return found


async def test_trail_is_searched_by_account_actor_action_and_time(
    api: Api, two_actors: Callable[..., Any]
) -> None:
    every = [
        "admin account.suspend", "Grace account.create", "admin account.create",
        "admin admin_key.create",
    ]  # fmt: skip
    assert await two_actors() == every
    assert await two_actors(actor="Grace") == ["Grace account.create"]
    assert await two_actors(action="account.create") == every[1:3]
    assert await two_actors(actor="admin", action="account.create") == [every[2]]
    (suspended,) = await _acts(api, action="account.suspend")
    of_account = await two_actors(account_id=suspended["account_id"])
    assert of_account == [every[0], every[2]]
    assert await two_actors(since=suspended["created_at"]) == [every[0]]
    assert await two_actors(until=suspended["created_at"]) == every[1:]
    assert await two_actors(since="1900-01-01T00:00:00Z") == every
    assert await two_actors(until="1900-01-01T00:00:00Z") == []
    for name in ("account_id", "since", "until"):
        error = await api.refused("GET", f"{ADMIN}/audit-trail", 400, params={name: "x"})
        assert error["param"] == name


async def test_search_of_the_trail_is_bounded_and_goes_on(
    api: Api, two_actors: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    del two_actors
    monkeypatch.setattr(trail, "_SCANNED_ACTS", 1)
    first = await api.admin("GET", "/audit-trail", params={"actor": "Grace"})
    assert first["data"] == []
    cursor = first["next_cursor"]
    second = await api.admin("GET", "/audit-trail", params={"actor": "Grace", "cursor": cursor})
    assert [act["actor"] for act in second["data"]] == ["Grace"]


async def test_configured_admin_is_nobodys_to_revoke(api: Api) -> None:
    assert (await api.admin("GET", "/admin-keys"))["data"] == []
    assert (await api.call("GET", f"{ADMIN}/accounts", key=ADMIN_KEY)).status_code == 200
