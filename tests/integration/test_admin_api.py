"""The admin API: accounts, grants, keys, and what only the operator sees."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from proxy.ids import uuid7
from tests.integration.money import NewAccount, capture, void
from tests.support.api import Api
from tests.support.service import ADMIN_KEY

pytestmark = pytest.mark.anyio

SECRET_BYTES = 32
EVERY_PATH = [
    ("GET", "/accounts"),
    ("POST", "/accounts"),
    ("GET", "/accounts/x"),
    ("GET", "/accounts/x/balance"),
    ("POST", "/accounts/x/grants"),
    ("GET", "/accounts/x/keys"),
    ("POST", "/accounts/x/keys"),
    ("DELETE", "/accounts/x/keys/x"),
    ("GET", "/accounts/x/usage"),
    ("GET", "/accounts/x/ledger"),
    ("GET", "/reviews"),
    ("GET", "/reviews/summary"),
    ("POST", "/reviews/x"),
    ("GET", "/price-books"),
    ("GET", "/audit-trail"),
]


@pytest.fixture
async def account_id(api: Api) -> str:
    """An account without credits."""
    return await api.new_account()


def _utc(text: str) -> datetime:
    assert text.endswith("Z")
    return datetime.fromisoformat(text)


# --- who may ---


async def test_no_path_opens_without_the_admin_key(api: Api) -> None:
    for method, path in EVERY_PATH:
        assert (await api.refused(method, f"/admin/v1{path}", 401, key=None))["code"]
        error = await api.refused(method, f"/admin/v1{path}", 403, key="wrong")
        assert error["code"] == "admin_only", path


@pytest.mark.parametrize("credential", ["Bearer", "Bearer   ", "Basic YTpi", ""])
async def test_authorization_that_holds_no_key_is_401(api: Api, credential: str) -> None:
    headers = {"authorization": credential}
    await api.refused("GET", "/admin/v1/accounts", 401, key=None, headers=headers)


async def test_virtual_key_is_403(api: Api, account_id: str) -> None:
    key = (await api.new_key(account_id))["key"]
    error = await api.refused("GET", "/admin/v1/accounts", 403, key=key)
    assert error["code"] == "admin_only"


async def test_key_that_is_no_ascii_is_refused_and_one_that_is_set_so_is_taken(api: Api) -> None:
    headers = {"authorization": "Bearer schlüssel"}
    sent: Any = {name.encode(): text.encode() for name, text in headers.items()}
    await api.refused("GET", "/admin/v1/accounts", 403, key=None, headers=sent)
    umlaut = api.with_(admin_key="schlüssel")
    answer = await umlaut.call("GET", "/admin/v1/accounts", headers=sent)
    assert answer.status_code == 200


@pytest.mark.parametrize("configured", [None, ""])
async def test_without_an_admin_key_the_api_is_closed_and_says_how_to_open_it(
    api: Api, configured: str | None
) -> None:
    closed = api.with_(admin_key=configured)
    for key in (None, "", ADMIN_KEY):
        error = await closed.refused("GET", "/admin/v1/accounts", 403, key=key)
        assert (error["code"], "TALLYGATE_ADMIN_KEY" in error["message"]) == ("admin_only", True)


# --- accounts ---


async def test_account_is_made_read_and_listed_in_one_shape(api: Api) -> None:
    made = await api.admin("POST", "/accounts", {"name": "Ada", "tier": "gold"})
    nothing = {"credits": "0", "usd": "0"}
    assert made == {
        "id": made["id"],
        "name": "Ada",
        "tier": "gold",
        "status": "active",
        "replay_retries": True,
        "created_at": made["created_at"],
        "balance": {"posted": nothing, "held": nothing, "available": nothing},
        "credit_limit": nothing,
    }
    assert abs(_utc(made["created_at"]) - datetime.now(UTC)) < timedelta(minutes=1)
    more: dict[str, object] = {"status_reason": None, "overrides": {}, "last_request_at": None}
    shown = await api.admin("GET", f"/accounts/{made['id']}")
    assert shown == {**made, **more, "active_keys": 0, "all_keys": 0}
    assert (await api.admin("GET", "/accounts"))["data"] == [made]


async def test_answers_to_retries_are_switched_off_for_an_account(api: Api) -> None:
    account_id = await api.new_account()
    changed = await api.admin("PATCH", f"/accounts/{account_id}", {"replay_retries": False})
    assert changed["replay_retries"] is False
    assert (await api.admin("GET", f"/accounts/{account_id}")).items() >= changed.items()
    actions = [event["action"] for event in (await api.admin("GET", "/audit-trail"))["data"]]
    assert len(actions) == 2
    await api.refused("PATCH", f"/admin/v1/accounts/{account_id}", 400, json={"replay": 1})


async def test_account_has_the_default_tier_unless_told_otherwise(api: Api) -> None:
    answer = await api.call("POST", "/admin/v1/accounts", key=ADMIN_KEY, json={"name": "Ada"})
    assert (answer.status_code, answer.json()["tier"]) == (201, "default")
    assert answer.headers["cache-control"] == "no-store"


async def test_credit_limit_counts_as_available(api: Api) -> None:
    made = await api.admin("POST", "/accounts", {"name": "Ada", "credit_limit": "2.5"})
    balance = await api.admin("GET", f"/accounts/{made['id']}/balance")
    assert balance == {
        "posted": {"credits": "0", "usd": "0"},
        "held": {"credits": "0", "usd": "0"},
        "available": {"credits": "2.5", "usd": "0.0025"},
        "credit_limit": {"credits": "2.5", "usd": "0.0025"},
        "expiring": [],
    }


@pytest.mark.parametrize(
    "account_id", ["01900000-0000-7000-8000-000000000000", "nobody", "%00", "1" * 400]
)
async def test_unknown_and_malformed_accounts_are_404(api: Api, account_id: str) -> None:
    methods = {"/grants": "POST", f"/keys/{uuid7()}": "DELETE"}
    for path in ("", "/balance", "/usage", "/ledger", "/keys", *methods):
        whole = f"/admin/v1/accounts/{account_id}{path}"
        error = await api.refused(methods.get(path, "GET"), whole, 404)
        assert (error["code"], "no account" in error["message"]) == ("not_found", True), path


# --- grants ---


async def test_grant_is_posted_with_its_entry_and_its_audit_row(api: Api, account_id: str) -> None:
    grant = {"credits": "1000", "reason": "trial", "reference": "ada-1"}
    done = await api.admin("POST", f"/accounts/{account_id}/grants", grant)
    thousand = {"credits": "1000", "usd": "1"}
    assert set(done) == {"entry_id", "balance"}
    assert done["balance"]["available"] == done["balance"]["posted"] == thousand
    (entry,) = (await api.admin("GET", f"/accounts/{account_id}/ledger"))["data"]
    assert (entry["entry_id"], entry["request_id"]) == (done["entry_id"], None)
    assert (entry["kind"], entry["reason"], entry["reference"]) == ("grant", "trial", "ada-1")
    assert entry["amount"] == entry["posted_change"] == entry["posted_after"] == thousand
    (event, _) = (await api.admin("GET", "/audit-trail"))["data"]
    assert (event["actor"], event["action"], event["account_id"]) == ("admin", "grant", account_id)


async def test_grant_counts_once_for_its_reference(api: Api, account_id: str) -> None:
    path = f"/accounts/{account_id}/grants"
    grant = {"credits": "10", "reason": "trial", "reference": "ada-1"}
    first = await api.admin("POST", path, grant)
    again = await api.admin("POST", path, {**grant, "credits": 10})
    assert again == first
    error = await api.refused("POST", f"/admin/v1{path}", 409, json={**grant, "credits": "11"})
    assert (error["code"], error["param"]) == ("conflict", "reference")
    other = await api.new_account()
    await api.admin("POST", f"/accounts/{other}/grants", grant)
    assert len((await api.admin("GET", f"/accounts/{account_id}/ledger"))["data"]) == 1


async def test_smallest_and_largest_grants_are_exact(api: Api, account_id: str) -> None:
    path = f"/accounts/{account_id}/grants"
    smallest = {"credits": "0.000001", "reason": "r", "reference": "1"}
    await api.admin("POST", path, smallest)
    largest = {"credits": "1000000000000", "reason": "r", "reference": "2"}
    done = await api.admin("POST", path, largest)
    assert done["balance"]["posted"] == {
        "credits": "1000000000000.000001",
        "usd": "1000000000.000000001",
    }


async def test_account_that_would_burst_takes_no_more(api: Api, account_id: str) -> None:
    path = f"/accounts/{account_id}/grants"
    grant = {"credits": "1000000000000", "reason": "r"}
    for number in range(9):
        await api.admin("POST", path, {**grant, "reference": str(number)})
    error = await api.refused("POST", f"/admin/v1{path}", 400, json={**grant, "reference": "9"})
    assert error["param"] == "credits"


@pytest.mark.parametrize(
    "credits",
    [
        *("0", "-1", "abc", "", " 1", "1e999", "NaN", "Infinity", "0.0000001", "1" * 65),
        *("1000000000001", 0, -1, 10**30, 1.5, True, None, [], {}),
    ],
)  # fmt: skip
async def test_amounts_that_are_not_exact_and_positive_are_400(
    api: Api,
    account_id: str,
    credits: object,  # noqa: A002
) -> None:
    grant = {"credits": credits, "reason": "r", "reference": "x"}
    error = await api.refused("POST", f"/admin/v1/accounts/{account_id}/grants", 400, json=grant)
    assert error["param"] == "credits"
    assert not (await api.admin("GET", f"/accounts/{account_id}/ledger"))["data"]


@pytest.mark.parametrize("field", ["credits", "reason", "reference"])
async def test_grant_without_a_member_is_400_and_says_which(
    api: Api, account_id: str, field: str
) -> None:
    grant = {"credits": "1", "reason": "r", "reference": "x"}
    del grant[field]
    error = await api.refused("POST", f"/admin/v1/accounts/{account_id}/grants", 400, json=grant)
    assert (error["param"], "missing" in error["message"]) == (field, True)


# --- bodies ---


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b'"name"', b"\xff\xfe", b'{"name": "\\ud800"}'),
        *(b"[" * 60_000, b'{"name": NaN}', b'{"name": "Ada"} x', b'{"name": 1%b}' % (b"0" * 5000)),
    ],
)  # fmt: skip
async def test_what_is_no_json_object_is_400(api: Api, body: bytes) -> None:
    error = await api.refused("POST", "/admin/v1/accounts", 400, content=body)
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize(
    "body, param",
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "  "}, "name"),
        ({"name": "a\x00b"}, "name"),
        ({"name": "a" * 201}, "name"),
        ({"name": 7}, "name"),
        ({"name": None}, "name"),
        ({"name": "Ada", "tier": ""}, "tier"),
        ({"name": "Ada", "tier": "t" * 65}, "tier"),
        ({"name": "Ada", "tier": "\x00"}, "tier"),
        ({"name": "Ada", "credit_limit": "-1"}, "credit_limit"),
        ({"name": "Ada", "status": "closed"}, "status"),
        ({"name": "Ada", "a\x00": 1}, "a\x00"),
    ],
)
async def test_account_that_makes_no_sense_is_400_and_names_the_field(
    api: Api, body: dict[str, object], param: str
) -> None:
    error = await api.refused("POST", "/admin/v1/accounts", 400, json=body)
    assert error["param"] == param
    assert not (await api.admin("GET", "/accounts"))["data"]


@pytest.mark.parametrize(
    "limit, param",
    [
        ({"name": " "}, "name"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ({"expires_at": "2999-01-01T00:00:00"}, "expires_at"),
        ({"expires_at": "9999-12-31T23:59:59-12:00"}, "expires_at"),
        ({"expires_at": 4_000_000_000}, "expires_at"),
        ({"expires_at": "tomorrow"}, "expires_at"),
        ({"allowed_models": []}, "allowed_models"),
        ({"allowed_models": ["a", "\x00"]}, "allowed_models.1"),
        ({"allowed_models": ["m" * 257]}, "allowed_models.0"),
        ({"allowed_models": "gpt-4"}, "allowed_models"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"requests_per_minute": 2**31}, "requests_per_minute"),
        ({"requests_per_minute": 1.0}, "requests_per_minute"),
        ({"requests_per_minute": "1"}, "requests_per_minute"),
        ({"requests_per_minute": True}, "requests_per_minute"),
        ({"tokens_per_minute": 2**63}, "tokens_per_minute"),
        ({"max_concurrency": -1}, "max_concurrency"),
        ({"budget": "5"}, "budget"),
        ({"budget": {"credits": "0"}}, "budget.credits"),
        ({"budget": {"credits": "1", "period": "week"}}, "budget.period"),
        ({"budget": {"credits": "1", "each": "day"}}, "budget.each"),
        ({"key": "sk-mine"}, "key"),
    ],
)
async def test_key_that_makes_no_sense_is_400_and_names_the_field(
    api: Api, account_id: str, limit: dict[str, object], param: str
) -> None:
    path = f"/admin/v1/accounts/{account_id}/keys"
    error = await api.refused("POST", path, 400, json={"name": "k", **limit})
    assert error["param"] == param
    assert not (await api.admin("GET", f"/accounts/{account_id}/keys"))["data"]


async def test_body_over_64_kb_is_413(api: Api) -> None:
    content = b'{"name": "%b"}' % (b"a" * 65_536)
    error = await api.refused("POST", "/admin/v1/accounts", 413, content=content)
    assert error["code"] == "request_too_large"


async def test_text_of_every_script_comes_back_as_it_went(api: Api) -> None:
    name = 'Ada 🦉 \u202e "quoted" \'; DROP TABLE accounts; -- \\ \r\n'
    account_id = await api.new_account(name=name, tier="ñ")
    account = await api.admin("GET", f"/accounts/{account_id}")
    assert (account["name"], account["tier"]) == (name, "ñ")


# --- keys ---


async def test_key_is_shown_once_and_opens_the_account(api: Api, account_id: str) -> None:
    made = await api.new_key(account_id)
    assert made["key"].startswith("sk-")
    assert len(made["key"]) > SECRET_BYTES
    assert made["account_id"] == account_id
    (listed,) = (await api.admin("GET", f"/accounts/{account_id}/keys"))["data"]
    assert listed == {n: v for n, v in made.items() if n not in {"key", "account_id"}}
    assert listed["prefix"] == made["key"][:10]
    everything = await api.call("GET", "/admin/v1/audit-trail", key=ADMIN_KEY)
    assert made["key"] not in everything.text
    assert (await api.call("GET", "/api/v1/balance", key=made["key"])).status_code == 200


async def test_limits_of_a_key_come_back_as_they_went(api: Api, account_id: str) -> None:
    limits: dict[str, object] = {
        "allowed_models": ["gpt-*", "demo"],
        "requests_per_minute": 2**31 - 1,
        "tokens_per_minute": 2**63 - 1,
        "max_concurrency": 1,
    }
    expires_at = (datetime.now(UTC) + timedelta(days=1)).replace(microsecond=0)
    made = await api.new_key(
        account_id,
        **limits,
        expires_at=expires_at.astimezone().isoformat(),
        budget={"credits": "0.5", "period": "day"},
    )
    assert {name: made[name] for name in limits} == limits
    assert _utc(made["expires_at"]) == expires_at
    assert made["budget"] == {"credits": "0.5", "usd": "0.0005", "period": "day"}


async def test_revoked_key_is_refused_at_once_and_revoking_again_changes_nothing(
    api: Api, account_id: str
) -> None:
    made = await api.new_key(account_id)
    path = f"/accounts/{account_id}/keys/{made['id']}"
    assert (await api.call("GET", "/api/v1/balance", key=made["key"])).status_code == 200
    assert await api.admin("DELETE", path) is None
    assert (await api.refused("GET", "/api/v1/balance", 401, key=made["key"]))["code"]
    (listed,) = (await api.admin("GET", f"/accounts/{account_id}/keys"))["data"]
    assert (listed["status"], listed["revoked_at"] is None) == ("revoked", False)
    await api.admin("DELETE", path)
    events = (await api.admin("GET", "/audit-trail"))["data"]
    assert [event["action"] for event in events] == ["key.revoke", "key.create", "account.create"]
    assert {event["actor"] for event in events} == {"admin"}


async def test_keys_that_the_account_does_not_have_are_404(api: Api, account_id: str) -> None:
    foreign = await api.new_key(await api.new_account())
    for key_id in (foreign["id"], str(uuid7()), "nothing"):
        path = f"/admin/v1/accounts/{account_id}/keys/{key_id}"
        assert "no key" in (await api.refused("DELETE", path, 404))["message"]
    assert (await api.call("GET", "/api/v1/balance", key=foreign["key"])).status_code == 200


async def test_closed_account_gets_no_key(api: Api, account_id: str, database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("UPDATE tallygate.accounts SET status = 'closed'")
    path = f"/admin/v1/accounts/{account_id}/keys"
    assert "closed" in (await api.refused("POST", path, 409, json={"name": "k"}))["message"]


# --- reports ---


async def test_admin_sees_both_sides_of_a_request(api: Api, account: NewAccount) -> None:
    money = account(funds=1_000_000_000)
    request = money.hold(5_000)
    charge = {"cost_picos": 1_000_000, "model_answered": "m-2026", "cached_input_tokens": 1}
    money.settle(capture(request, 2_000, **charge))
    path = f"/accounts/{money.account_id}/usage"
    (row,) = (await api.admin("GET", path))["data"]
    assert row["usage"]["input_tokens"] == 3
    assert (row["usage"]["output_tokens"], row["usage"]["cached_input_tokens"]) == (4, 1)
    assert row["price"] == {"credits": "0.002", "usd": "0.000002"}
    assert row["cost"] == {"usd": "0.000001", "picos": "1000000"}
    assert (row["cost_source"], row["markup"], row["price_version"]) == ("header", "2", 1)
    assert row["hold"] == {"credits": "0.005", "usd": "0.000005"}
    assert (row["model"], row["model_answered"]) == ("m", "m-2026")
    assert (row["account_id"], row["key_id"]) == (str(money.account_id), str(money.key_id))
    assert (row["status"], row["review_reason"], row["error_code"]) == ("billed", None, None)
    assert _utc(row["created_at"]) <= _utc(row["settled_at"])


async def test_reviews_of_all_accounts_are_listed_and_nothing_else(
    api: Api, account: NewAccount
) -> None:
    asked: list[object] = []
    for money in (account(funds=1_000_000_000), account(funds=1_000_000_000)):
        money.settle(capture(money.hold(100), 50), void(money.hold(100)))
        request = money.hold(100)
        money.settle(void(request, status="needs_review", review_reason="cost_unknown"))
        money.hold(100)
        asked.append(request["request_id"])
    page = await api.admin("GET", "/reviews")
    assert [row["request_id"] for row in page["data"]] == asked[::-1]
    assert {(row["status"], row["review_reason"]) for row in page["data"]} == {
        ("needs_review", "cost_unknown")
    }
    assert {row["price"] for row in page["data"]} == {None}


async def test_price_books_are_listed_with_their_rules(api: Api) -> None:
    books = api.services.price_books
    for factor in ("2.0", "3.0"):
        document = {"default": {"kind": "markup", "factor": factor}}
        await books.publish(document, nanos_per_credit=1_000_000, actor="config")
    page = await api.admin("GET", "/price-books", params={"limit": 1})
    (newest,) = page["data"]
    assert (newest["version"], newest["credit_usd"]) == (2, "0.001")
    assert newest["document"]["default"]["factor"] in {"3", "3.0"}
    rest = await api.admin("GET", "/price-books", params={"cursor": page["next_cursor"]})
    assert ([row["version"] for row in rest["data"]], rest["next_cursor"]) == ([1], None)
    (event, _) = (await api.admin("GET", "/audit-trail"))["data"]
    assert (event["action"], event["account_id"]) == ("price_book.publish", None)


@pytest.mark.parametrize("what", ["accounts", "keys", "audit-trail"])
async def test_lists_are_newest_first_and_pages_meet_without_a_gap(api: Api, what: str) -> None:
    account_id = await api.new_account()
    path = f"/accounts/{account_id}/keys" if what == "keys" else f"/{what}"
    for number in range(4):
        if what == "keys":
            await api.new_key(account_id, name=str(number))
        else:
            await api.new_account(name=str(number))
    whole = (await api.admin("GET", path))["data"]
    ids = [row["id"] for row in whole]
    assert ids == sorted(ids, key=UUID, reverse=True)
    found: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        page = await api.admin("GET", path, params={"limit": 2, **cursor})
        found += [row["id"] for row in page["data"]]
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert found == ids


# --- the envelope ---


async def test_every_answer_has_a_request_id_of_its_own(api: Api) -> None:
    good = await api.call("GET", "/admin/v1/accounts", key=ADMIN_KEY)
    lost = await api.call("GET", "/nowhere")
    ids = {answer.headers["x-request-id"] for answer in (good, lost)}
    assert len(ids) == 2
    assert all(UUID(each) for each in ids)


@pytest.mark.parametrize("path", ["/", "/admin", "/admin/v1/nothing", "/api/v1/balance/", "//x"])
async def test_paths_that_do_not_exist_are_404_in_the_usual_shape(api: Api, path: str) -> None:
    assert (await api.refused("GET", path, 404))["code"] == "not_found"


async def test_method_that_a_path_does_not_take_is_405_and_says_which_it_does(api: Api) -> None:
    answer = await api.call("PATCH", "/admin/v1/accounts", key=ADMIN_KEY)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, POST")
    assert answer.json()["error"]["code"] == "method_not_allowed"


async def test_head_is_answered_like_get(api: Api) -> None:
    assert (await api.call("HEAD", "/admin/v1/accounts", key=ADMIN_KEY)).status_code == 200


async def test_defect_is_a_500_that_shows_nothing_of_itself(
    api: Api, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("ALTER TABLE tallygate.accounts RENAME TO gone")
    error = await api.refused("GET", "/admin/v1/accounts", 500)
    assert error["code"] == "internal_error"
    assert "gone" not in str(error)
    assert "accounts" not in str(error)
    (record,) = [each for each in caplog.records if each.name == "proxy.api.web"]
    assert str(record.__dict__["request_id"]) in error["message"]
    assert record.exc_info
