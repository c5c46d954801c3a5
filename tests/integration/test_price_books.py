"""Price books: drafts, versions that are to come, rolling back, markups."""

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from proxy.db import make_pool
from proxy.price_books import PriceBooks
from tests.support.api import NANOS_PER_CREDIT, Api

pytestmark = pytest.mark.anyio

BOOKS = "/price-books"
DRAFTS = "/price-books/drafts"
DOUBLE: dict[str, Any] = {"default": {"kind": "markup", "factor": "2"}}
TRIPLE: dict[str, Any] = {"default": {"kind": "markup", "factor": "3"}}
FLAT = {"kind": "flat", "credits": "5"}


@pytest.fixture
async def priced(api: Api) -> Api:
    """The API with a price book in force, version 1, as a start publishes it."""
    await api.services.price_books.publish_configured(DOUBLE, nanos_per_credit=NANOS_PER_CREDIT)
    await api.services.price_books.refresh()
    return api


async def draft(api: Api, document: dict[str, Any] = TRIPLE) -> str:
    made = await api.admin("POST", DRAFTS, {"name": "new", "document": document})
    return f"{DRAFTS}/{made['id']}"


async def publish(api: Api, document: dict[str, Any], **body: Any) -> Any:
    return await api.admin("POST", await draft(api, document) + "/publish", body)


def after(**delta: float) -> str:
    return (datetime.now(UTC) + timedelta(**delta)).isoformat()


async def states(api: Api) -> dict[int, str]:
    rows = (await api.admin("GET", BOOKS))["data"]
    return {row["version"]: row["state"] for row in rows}


async def actions(api: Api) -> list[tuple[str, dict[str, Any]]]:
    rows = (await api.admin("GET", "/audit-trail"))["data"]
    assert {row["actor"] for row in rows} <= {"admin", "config"}
    return [(row["action"], row["detail"]) for row in rows]


async def test_a_draft_begins_as_a_copy_of_what_is_in_force(priced: Api) -> None:
    made = await priced.admin("POST", DRAFTS, {"name": "summer"})
    assert (made["name"], made["based_on"], made["created_by"]) == ("summer", 1, "admin")
    assert made["document"] == (await priced.admin("GET", f"{BOOKS}/1"))["document"]
    assert made["published_version"] is None
    path = f"{DRAFTS}/{made['id']}"
    changed = await priced.admin("PUT", path, {"name": "autumn", "document": TRIPLE})
    assert (changed["name"], changed["document"]["default"]["factor"]) == ("autumn", "3")
    assert changed["updated_at"] > changed["created_at"]
    assert await priced.admin("GET", path) == changed
    assert (await priced.admin("GET", DRAFTS))["data"] == [changed]
    await priced.admin("DELETE", path)
    assert (await priced.admin("GET", DRAFTS))["data"] == []
    detail = {"draft_id": made["id"]}
    assert (await actions(priced))[:3] == [
        ("price_book_draft.delete", {**detail, "name": "autumn"}),
        ("price_book_draft.change", {**detail, "name": "autumn"}),
        ("price_book_draft.create", {**detail, "name": "summer"}),
    ]
    # Nobody was charged by it.
    assert (await priced.services.price_books.refresh()).version == 1


async def test_a_draft_that_makes_no_sense_is_refused_with_the_place(priced: Api) -> None:
    path = await draft(priced)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"default": {"kind": "markup", "factor": "0.5"}}, "default.factor: sells below cost"),
        ({"rules": [{"kind": "flat", "credits": 1}]}, "rules[0]: needs one of account"),
        ({"default": {"kind": "flat", "credits": 1.5}}, "default.credits: write it as a string"),
        ({"rules": [{"model": "\x00", **FLAT}]}, "rules[0].model: must be a text"),
        ({"action": {}}, "price book: unknown member 'action'"),
        ({"actions": {"a": "1e999999"}}, "actions.a: "),
        ({"actions": {"a": 10**300}}, "actions.a: "),
    ]
    for document, where in wrong:
        body = {"name": "wrong", "document": document}
        for method, at in (("POST", DRAFTS), ("PUT", path)):
            error = await priced.refused(method, "/admin/v1" + at, 400, json=body)
            assert error["message"].startswith(f"The price book is wrong at {where}")
            assert error["param"] == "document"


async def test_a_difference_is_told_rule_by_rule(priced: Api) -> None:
    await publish(priced, {**DOUBLE, "rules": [{"tier": "pro", **FLAT}], "actions": {"a": "1"}})
    rules = [{"tier": "pro", "kind": "flat", "credits": "6"}, {"model": "gpt", **FLAT}]
    path = await draft(priced, {**TRIPLE, "rules": rules})
    found = await priced.admin("GET", path + "/diff")
    assert (found["live_version"], found["unchanged"], found["reordered"]) == (2, False, False)
    assert found["default"]["before"]["factor"] == "2"
    assert found["default"]["after"]["factor"] == "3"
    changed, added = found["rules"]
    assert (changed["change"], changed["tier"], changed["model"]) == ("changed", "pro", None)
    assert (changed["before"]["credits"], changed["after"]["credits"]) == ("5", "6")
    assert (added["change"], added["model"], added["before"]) == ("added", "gpt", None)
    assert found["actions"] == [{"action": "a", "before": "1", "after": None}]
    copy = await priced.admin("POST", DRAFTS, {"name": "copy"})
    same = await priced.admin("GET", f"{DRAFTS}/{copy['id']}/diff")
    assert (same["unchanged"], same["default"], same["rules"]) == (True, None, [])


async def test_a_draft_is_published_once(priced: Api) -> None:
    path = await draft(priced)
    first = await priced.admin("POST", path + "/publish", {})
    assert (first["version"], first["outcome"], first["state"]) == (2, "published", "in_force")
    # In this process at once.
    assert priced.services.price_books.current.version == 2
    again = await priced.admin("POST", path + "/publish", {"at": after(hours=1)})
    assert (again["version"], again["outcome"], again["overtaken"]) == (2, "exists", [])
    assert (await priced.admin("GET", path))["published_version"] == 2
    body = {"name": "late", "document": DOUBLE}
    assert await priced.refused("PUT", "/admin/v1" + path, 409, json=body)
    ((action, detail), *_) = await actions(priced)
    assert action == "price_book.publish"
    assert (detail["version"], detail["draft_id"]) == (2, path.rpartition("/")[2])
    # What it was published as outlives it.
    await priced.admin("DELETE", path)
    assert await states(priced) == {2: "in_force", 1: "past"}


async def test_a_draft_does_not_undo_what_was_published_since(priced: Api) -> None:
    late = await draft(priced)
    await publish(priced, {**DOUBLE, "rules": [{"model": "gpt", **FLAT}]})
    path = f"/admin/v1{late}/publish"
    error = await priced.refused("POST", path, 409, json={})
    assert (error["param"], error["version"]) == ("based_on", 2)
    assert "send based_on 2" in error["message"]
    assert await priced.refused("POST", path, 409, json={"based_on": 1})
    done = await priced.admin("POST", late + "/publish", {"based_on": 2})
    assert (done["version"], done["document"]["rules"]) == (3, [])


async def test_a_version_comes_into_force_at_its_time_on_every_replica(
    priced: Api, database_url: str
) -> None:
    async with make_pool(database_url, max_size=2) as pool, contextlib.AsyncExitStack() as stack:
        replicas = [PriceBooks(pool) for _ in range(2)]
        at = datetime.now(UTC) + timedelta(seconds=0.6)
        done = await publish(priced, TRIPLE, at=at.isoformat())
        assert (done["version"], done["state"]) == (2, "scheduled")
        assert datetime.fromisoformat(done["valid_from"]) == at
        for books in replicas:
            await books.refresh()
            task = asyncio.create_task(books.run(interval_s=0.05))
            stack.callback(task.cancel)
        while replicas[0].current.version == 1 or replicas[1].current.version == 1:
            seen = [books.current.version for books in replicas]
            assert datetime.now(UTC) < at + timedelta(seconds=5), seen
            await asyncio.sleep(0.01)
        assert datetime.now(UTC) >= at
    assert await states(priced) == {2: "in_force", 1: "past"}


async def test_a_replica_does_not_wait_for_its_next_look(priced: Api) -> None:
    books = priced.services.price_books
    at = datetime.now(UTC) + timedelta(seconds=0.7)
    await publish(priced, TRIPLE, at=at.isoformat())
    task = asyncio.create_task(books.run(interval_s=0.5))
    while books.current.version == 1:
        # The looks are at 0.5 s and 1.0 s.
        assert datetime.now(UTC) < at + timedelta(seconds=0.2)
        await asyncio.sleep(0.01)
    task.cancel()


async def test_a_version_is_called_off_before_its_time(priced: Api) -> None:
    await publish(priced, TRIPLE, at=after(hours=1))
    assert await states(priced) == {2: "scheduled", 1: "in_force"}
    for _ in range(2):
        await priced.admin("DELETE", f"{BOOKS}/2")
    assert await states(priced) == {2: "cancelled", 1: "in_force"}
    cancelled = [detail for action, detail in await actions(priced) if action.endswith("cancel")]
    assert [detail["version"] for detail in cancelled] == [2]
    # It is as if it had not been: the same document is published again, as another version.
    assert (await publish(priced, TRIPLE))["version"] == 3
    assert await states(priced) == {3: "in_force", 2: "cancelled", 1: "past"}


@pytest.mark.parametrize("seconds", [0, 3])
async def test_a_version_whose_time_has_come_or_is_about_to_stays(
    priced: Api, seconds: int
) -> None:
    at = {"at": after(seconds=seconds)} if seconds else {}
    await publish(priced, TRIPLE, **at)
    error = await priced.refused("DELETE", "/admin/v1/price-books/2", 409)
    assert "Publish another version" in error["message"]


async def test_what_is_published_last_decides_on_its_time_and_all_after_it(priced: Api) -> None:
    await publish(priced, TRIPLE, at=after(hours=1))
    await publish(priced, {"default": FLAT}, at=after(hours=3), based_on=2)
    third = await publish(priced, DOUBLE, at=after(hours=2), based_on=2)
    assert (third["version"], third["overtaken"]) == (4, [3])
    assert await states(priced) == {
        4: "scheduled", 3: "overtaken", 2: "scheduled", 1: "in_force",
    }  # fmt: skip
    # Cancelled, it decides on nothing any more.
    await priced.admin("DELETE", f"{BOOKS}/4")
    assert await states(priced) == {
        4: "cancelled", 3: "scheduled", 2: "scheduled", 1: "in_force",
    }  # fmt: skip
    # What would be in force then counts, not what is now.
    late = f"/admin/v1{await draft(priced)}/publish"
    assert (await priced.refused("POST", late, 409, json={"at": after(hours=4)}))["version"] == 3
    now = await publish(priced, {"default": FLAT})
    assert (now["version"], now["overtaken"]) == (5, [2, 3])
    assert await states(priced) == {
        5: "in_force", 4: "cancelled", 3: "overtaken", 2: "overtaken", 1: "past",
    }  # fmt: skip


async def test_rolling_back_is_publishing_an_old_version_anew(priced: Api) -> None:
    await publish(priced, TRIPLE)
    back = await priced.admin("POST", f"{BOOKS}/1/publish", {})
    assert (back["version"], back["outcome"]) == (3, "published")
    assert back["document"] == (await priced.admin("GET", f"{BOOKS}/1"))["document"]
    again = await priced.admin("POST", f"{BOOKS}/1/publish", {})
    assert (again["version"], again["outcome"]) == (3, "unchanged")
    ((action, detail), *_) = await actions(priced)
    assert (action, detail["of_version"]) == ("price_book.publish", 1)
    # It says the same as what is in force, and yet it is news: something else was to come.
    await publish(priced, TRIPLE, at=after(hours=1))
    stopped = await priced.admin("POST", f"{BOOKS}/1/publish", {})
    assert (stopped["version"], stopped["overtaken"]) == (5, [4])
    body = {"based_on": 4, "at": after(hours=1)}
    error = await priced.refused("POST", "/admin/v1/price-books/2/publish", 409, json=body)
    assert error["version"] == 5


async def test_unknown_versions_and_drafts_are_none(priced: Api) -> None:
    for version in ("9", "0", "x", "-1", "99999999999", "2147483648", "¹"):
        path = f"/admin/v1/price-books/{version}"
        for method in ("GET", "DELETE"):
            assert await priced.refused(method, path, 404)
        assert await priced.refused("POST", path + "/publish", 404, json={})
    for draft_id in ("x", "0192f0c1-2345-7abc-8def-0123456789ab"):
        path = f"/admin/v1{DRAFTS}/{draft_id}"
        body: dict[str, Any] = {"name": "n", "document": {}}
        for method, at in (
            ("GET", path), ("PUT", path), ("DELETE", path), ("GET", path + "/diff"),
            ("POST", path + "/publish"), ("POST", path + "/replay"),
        ):  # fmt: skip
            assert await priced.refused(method, at, 404, json=body if method == "PUT" else {})


async def test_a_markup_is_set_and_removed(priced: Api) -> None:
    done = await priced.admin("PUT", "/markups", {"tier": "pro", "factor": "1.5"})
    assert (done["version"], done["outcome"]) == (2, "published")
    (rule,) = done["document"]["rules"]
    assert (rule["tier"], rule["kind"], rule["factor"]) == ("pro", "markup", "1.5")
    account_id = await priced.new_account()
    body = {"account": account_id, "model": "gpt-*", "factor": "0.9", "allow_loss": True}
    await priced.admin("PUT", "/markups", {**body, "based_on": 2})
    live = priced.services.price_books.current
    assert (live.version, live.book.select(account_id, "pro", "gpt-5").name) == (3, "rules[1]")
    named = {"account": account_id, "model": "gpt-*"}
    done = await priced.admin("DELETE", "/markups", params={**named, "based_on": 3})
    assert (done["version"], done["document"]["rules"]) == (4, [rule])
    ((_, detail), *_) = await actions(priced)
    assert (detail["of_version"], detail["rule"]) == (3, named)
    assert await priced.refused("DELETE", "/admin/v1/markups", 404, params=named)
    done = await priced.admin("PUT", "/markups", {"factor": 4})
    assert (done["document"]["default"]["factor"], done["document"]["rules"]) == ("4", [rule])


async def test_a_markup_that_makes_no_sense_is_refused(priced: Api) -> None:
    for body, status, param in (
        ({"factor": "0.5"}, 400, "factor"),
        ({"factor": "x", "tier": "pro"}, 400, "factor"),
        ({"factor": "2", "minimum": "-1"}, 400, "minimum"),
        ({"factor": "2", "model": "a\u200bb"}, 400, "model"),
        ({"factor": "2", "model": ""}, 400, "model"),
        ({"factor": "2", "based_on": 7}, 409, "based_on"),
        ({"factor": "2", "based_on": 2**31}, 400, "based_on"),
    ):
        error = await priced.refused("PUT", "/admin/v1/markups", status, json=body)
        assert error["param"] == param
    for asked, status in (
        ({}, 400),
        ({"account": "x"}, 400),
        ({"tier": "pro", "based_on": "x"}, 400),
        ({"tier": "pro", "based_on": "7"}, 409),
        ({"tier": "\x00"}, 404),
    ):
        assert await priced.refused("DELETE", "/admin/v1/markups", status, params=asked)
    assert await states(priced) == {1: "in_force"}


async def test_a_markup_does_not_overtake_what_is_scheduled(priced: Api) -> None:
    await publish(priced, TRIPLE, at=after(hours=1))
    body = {"factor": "4"}
    error = await priced.refused("PUT", "/admin/v1/markups", 409, json=body)
    assert error["version"] == 2
    await priced.admin("DELETE", f"{BOOKS}/2")
    assert (await priced.admin("PUT", "/markups", body))["version"] == 3


async def test_before_the_first_publication_there_is_nothing_to_change(api: Api) -> None:
    assert await api.refused("POST", "/admin/v1" + DRAFTS, 409, json={"name": "copy"})
    assert await api.refused("PUT", "/admin/v1/markups", 409, json={"factor": "2"})
    path = await draft(api)
    assert await api.refused("GET", f"/admin/v1{path}/diff", 409)
    done = await api.admin("POST", path + "/publish", {})
    assert (done["version"], done["state"]) == (1, "in_force")


async def test_a_publication_for_no_time_to_come_is_refused(priced: Api) -> None:
    path = f"/admin/v1{await draft(priced)}/publish"
    for body in (
        {"at": "2020-01-01T00:00:00Z"}, {"at": "soon"}, {"based_on": ""}, {"based_on": 2**31},
    ):  # fmt: skip
        assert await priced.refused("POST", path, 400, json=body)
