"""All that is known of an account can be had, and what tells of a person can be forgotten."""

import io
import json
import tracemalloc
import zipfile
from typing import Any
from uuid import UUID

import psycopg
import pytest

from proxy.api.archive import archive
from proxy.audit import audit, check_seals
from proxy.ids import uuid7
from proxy.seals import Sealer
from proxy.webhooks import Watch
from tests.integration.money import Money, NewAccount, capture, void
from tests.support.api import NANOS_PER_CREDIT, Api

pytestmark = pytest.mark.anyio

PERSON = "Lovelace"
# Every column that could hold a text about a person, and what an erasure does about it.
ERASED = {
    "accounts.name", "audit_trail.detail", "charges.description", "charges.metadata",
    "idempotency_keys.headers", "projects.name", "recurring_charges.description",
    "recurring_charges.metadata", "virtual_keys.allowed_networks", "virtual_keys.name",
    "virtual_keys.prefix", "webhook_deliveries.last_error", "webhook_events.data",
    "webhook_events.type", "idempotency_keys.state", "webhook_deliveries.status",
}  # fmt: skip
# Operators' own words for what the books need: docs/operations.md asks them to name nobody.
KEPT_FOR_THE_BOOKS = {
    "entries.reason", "entries.reference", "funding.actor", "funding.external_id",
    "funding.reason", "funding.source", "audit_trail.actor", "charges.operator",
    "recurring_charges.operator",
}  # fmt: skip
# Names of the house: models, tiers, kinds, states.
IMPERSONAL = {
    "accounts": {"overrides", "status", "tier"},
    "audit_trail": {"action"},
    "carried_totals": {"kind"},
    "charges": {"action"},
    "entries": {"kind"},
    "funding": {"kind"},
    "open_holds": {"endpoint", "model", "tier"},
    "projects": {"budget_period", "status"},
    "recurring_charges": {"action", "every", "problem", "status"},
    "usage": {
        "answer_id", "cost_source", "endpoint", "error_code", "model", "model_answered",
        "resolution", "review_reason", "rule", "service_tier", "status", "tier",
    },
    "usage_rollups": {"endpoint", "error_code", "model", "status", "tier"},
    "virtual_keys": {"allowed_endpoints", "allowed_models", "budget_period", "role", "status"},
    "webhook_told": {"type"},
}  # fmt: skip
REVIEW = {"status": "needs_review", "review_reason": "usage_missing", "price": None}


class Customer:
    """An account of a person, made over the API, that has done a bit of everything."""

    def __init__(self, api: Api, money: Money) -> None:
        self.api = api
        self.money = money
        self.account_id = ""
        self.key = ""

    async def live(self) -> None:
        self.account_id = await self.api.new_account(name=f"Ada {PERSON}", credits="1000")
        key = await self.api.new_key(self.account_id, name=f"{PERSON}'s laptop")
        self.key = key["key"]
        self.money.account_id, self.money.key_id = UUID(self.account_id), UUID(key["id"])
        self.money.all(
            "UPDATE virtual_keys SET role = 'manage' WHERE account_id = %s RETURNING 1",
            self.money.account_id,
        )
        await self.api.services.projects.create(
            self.money.account_id,
            name=f"{PERSON}'s project",
            budget_nanos=None,
            budget_period="total",
            actor="admin",
        )
        self.money.all(
            "INSERT INTO charges (account_id, request_id, body_hash, action, quantity, price,"
            " rounding_attos, price_version, is_hold, ttl_s, description, metadata)"
            " VALUES (%s, %s, %s, 'page', 1, 1, 0, 1, false, 60, %s, %s) RETURNING 1",
            self.money.account_id,
            uuid7(),
            b"b" * 32,
            f"{PERSON}'s page",
            json.dumps({"for": PERSON}),
        )
        self.money.all(
            "INSERT INTO recurring_charges (account_id, recurring_id, body_hash, action, quantity,"
            " every, starts_at, due_at, description) VALUES"
            " (%s, %s, %s, 'hosting', 1, 'day', now(), now(), %s) RETURNING 1",
            self.money.account_id,
            uuid7(),
            b"b" * 32,
            f"{PERSON}'s server",
        )
        for price in (3, 5):
            self.money.settle(capture(self.money.hold(10), price))
        self.money.settle(void(self.money.hold(10), **REVIEW))
        self.money.all(
            "SELECT outcome FROM idempotency_begin(%s, %s, %s, %s, 60, 3600)",
            self.money.account_id,
            b"k" * 32,
            b"b" * 32,
            uuid7(),
        )
        await Watch(self.api.services.webhooks, interval_s=1, retention_s=1).round()

    def close(self) -> None:
        self.money.all(
            "UPDATE accounts SET status = 'closed', version = version + 1"
            " WHERE account_id = %s RETURNING 1",
            self.money.account_id,
        )
        self.money.all(
            "INSERT INTO audit_trail VALUES (%s, %s, now() - interval '10 days', 'x',"
            " 'account.close') RETURNING 1",
            self.money.account_id,
            uuid7(),
        )

    async def erase(self) -> Any:
        path = f"/accounts/{self.account_id}/erase"
        return await self.api.admin("POST", path, {"reason": "asked for it"})

    async def archive(self, key: str | None = None) -> dict[str, Any]:
        """Every file of the archive; a customer's where a key is given."""
        path = f"/admin/v1/accounts/{self.account_id}/export"
        if key is None:
            answer = await self.api.call("GET", path, key="admin-key-of-the-tests")
        else:
            answer = await self.api.call("GET", "/api/v1/export", key=key)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/zip"
        name = f'attachment; filename="account-{self.account_id}.zip"'
        assert answer.headers["content-disposition"] == name
        with zipfile.ZipFile(io.BytesIO(answer.content)) as file:
            assert file.testzip() is None
            return {
                entry: [json.loads(line) for line in file.read(entry).splitlines()]
                if entry.endswith(".jsonl")
                else json.loads(file.read(entry))
                for entry in file.namelist()
            }


@pytest.fixture
async def customer(api: Api, account: NewAccount) -> Customer:
    made = Customer(api, account())
    await made.live()
    return made


def places_of(url: str, text: str) -> set[str]:
    """The tables that hold this text anywhere."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET search_path = tallygate")
        tables = connection.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'tallygate'::regnamespace"
            " AND relkind = 'r'"
        ).fetchall()
        return {
            table
            for (table,) in tables
            if connection.execute(
                f'SELECT 1 FROM "{table}" AS t WHERE t::text LIKE %s LIMIT 1'.encode(),
                (f"%{text}%",),
            ).fetchone()
        }


# --- export ---


async def test_an_archive_has_everything_in_the_shapes_of_the_api(customer: Customer) -> None:
    api, path = customer.api, f"/accounts/{customer.account_id}"
    found = await customer.archive()
    assert found["account.json"].items() <= (await api.admin("GET", path)).items()
    for name in ("keys", "usage", "ledger"):
        rows = (await api.admin("GET", f"{path}/{name}"))["data"]
        assert found[f"{name}.jsonl"] == rows[::-1]
        assert rows
    for name in ("charges", "recurring_charges"):
        assert [PERSON in row["description"] for row in found[f"{name}.jsonl"]] == [True]
    assert [project["name"] for project in found["projects.jsonl"]] == [f"{PERSON}'s project"]
    (grant,) = found["funding.jsonl"]
    assert (grant["kind"], grant["reason"], grant["reference"]) == ("grant", "test", "first")
    acts = [act["action"] for act in found["audit_trail.jsonl"]]
    assert acts == ["account.create", "grant", "key.create", "project.create"]
    assert found["manifest.json"]["rows"] == {
        name: len(rows) for name, rows in found.items() if name.endswith(".jsonl")
    }
    assert customer.key not in json.dumps(found)


async def test_a_customers_archive_has_no_cost_and_no_note_of_an_operator(
    customer: Customer,
) -> None:
    found = await customer.archive(customer.key)
    operators = await customer.archive()
    assert found.keys() == operators.keys()
    assert found["manifest.json"]["rows"] == operators["manifest.json"]["rows"]
    names = {
        name
        for entry, rows in found.items()
        if entry.endswith(".jsonl")
        for row in rows
        for name in row
    }
    assert "price" in names
    assert not {name for name in names if "cost" in name or "picos" in name}
    assert not names & {"reason", "actor", "markup", "rule", "detail"}
    assert "cost" in {name for row in operators["usage.jsonl"] for name in row}


async def test_an_export_is_of_one_moment(customer: Customer) -> None:
    services = customer.api.services
    async with services.privacy.snapshot(UUID(customer.account_id)) as snapshot:
        before = await snapshot.balance()
        customer.money.fund(1_000, "meanwhile")
        entries = [row async for page in snapshot.entries() for row in page]
        assert entries[-1]["posted_after"] == before["posted"]


async def test_memory_does_not_grow_with_an_account(customer: Customer) -> None:
    rows = 6000
    customer.money.all(
        "INSERT INTO usage (account_id, request_id, key_id, created_at, settled_at, endpoint,"
        " model, tier, streamed, byok, status, price, price_version, hold)"
        " SELECT %s, overlay(uuid_floor(now())::text placing lpad(to_hex(n), 12, '0')"
        " FROM 25)::uuid, %s, now(), now(), 'chat.completions', 'm' || n, 'default', false,"
        " false, 'billed', n, 1, 0 FROM generate_series(1, %s) AS n RETURNING 1",
        customer.money.account_id,
        customer.money.key_id,
        rows,
    )
    services, size = customer.api.services, 0
    account = await services.accounts.account(UUID(customer.account_id))
    assert account is not None
    tracemalloc.start()
    try:
        async with services.privacy.snapshot(UUID(customer.account_id)) as snapshot:
            async for chunk in archive(services, snapshot, account, is_operators=True):
                size += len(chunk)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 100_000
    # A page of 500 rows takes two megabytes, all of them more than twenty.
    assert peak < 8_000_000


async def test_few_exports_run_at_a_time_and_each_gives_its_turn_back(customer: Customer) -> None:
    privacy = customer.api.services.privacy
    privacy.begin()
    for _ in range(3):
        await customer.archive()
    path = f"/admin/v1/accounts/{customer.account_id}/export"
    assert (await customer.api.call("HEAD", path, key="admin-key-of-the-tests")).content == b""
    privacy.begin()
    error = await customer.api.refused("GET", path, 429)
    assert error["code"] == "rate_limit_exceeded"


# --- erasure ---


async def test_what_tells_of_a_person_is_gone_and_the_books_stay(
    customer: Customer, database_url: str
) -> None:
    services = customer.api.services
    await Sealer(services.pool).seal()
    await customer.api.admin("POST", "/webhooks", {"url": "https://example.com"})
    before = customer.money.all(
        "SELECT * FROM entries WHERE account_id = %s ORDER BY seq", customer.money.account_id
    )
    # Prices without a price book are none that could be made again.
    violations = [found.violations for found in audit(database_url)]
    prefix = customer.key[:10]
    assert places_of(database_url, PERSON) == {
        "accounts",
        "audit_trail",
        "charges",
        "projects",
        "recurring_charges",
        "virtual_keys",
    }
    assert places_of(database_url, prefix) == {"audit_trail", "virtual_keys"}
    customer.close()

    erased = await customer.erase()
    assert erased["id"] == customer.account_id
    assert places_of(database_url, PERSON) == places_of(database_url, prefix) == set()
    for table in ("idempotency_keys", "webhook_events", "webhook_deliveries", "webhook_lanes"):
        assert customer.money.one(
            f"SELECT count(*) FROM {table} WHERE account_id = %s", customer.money.account_id
        ) == (0,)
    assert before == customer.money.all(
        "SELECT * FROM entries WHERE account_id = %s ORDER BY seq", customer.money.account_id
    )
    assert [found.violations for found in audit(database_url)] == violations
    assert [found.name for found in check_seals(database_url).findings if found.violations] == []

    found = await customer.archive()
    assert found["account.json"]["name"] == "erased"
    trail = {act["action"]: act["detail"] for act in found["audit_trail.jsonl"]}
    assert trail["account.create"] == {"name": "erased", "tier": "default", "credit_limit": 0}
    assert trail["grant"]["amount"] == 1000 * NANOS_PER_CREDIT
    assert trail["grant"]["reason"] == "erased"
    assert trail["account.erase"] == {"reason": "asked for it"}
    # Again changes nothing.
    assert await customer.erase() == erased
    assert await customer.archive() | {"manifest.json": 0} == found | {"manifest.json": 0}


async def test_what_was_closed_long_ago_is_erased_where_that_is_wanted(customer: Customer) -> None:
    privacy = customer.api.services.privacy
    assert await privacy.erase_closed(after_days=1) == 0
    customer.close()
    assert await privacy.erase_closed(after_days=11) == 0
    assert await privacy.erase_closed(after_days=9) == 1
    assert await privacy.erase_closed(after_days=9) == 0
    found = await customer.archive()
    assert found["account.json"]["name"] == "erased"
    assert found["audit_trail.jsonl"][-1]["actor"] == "retention"


async def test_a_key_of_an_erased_account_is_unknown(customer: Customer) -> None:
    customer.close()
    await customer.erase()
    await customer.api.refused("GET", "/api/v1/balance", 401, key=customer.key)


async def test_what_is_in_use_is_not_erased(customer: Customer, database_url: str) -> None:
    path = f"/admin/v1/accounts/{customer.account_id}/erase"
    body = {"reason": "too early"}
    error = await customer.api.refused("POST", path, 409, json=body)
    assert "Close it first" in error["message"]
    hold = customer.money.hold(10)
    customer.close()
    error = await customer.api.refused("POST", path, 409, json=body)
    assert "not ended" in error["message"]
    assert "accounts" in places_of(database_url, PERSON)
    assert customer.money.settle(capture(hold, 1)) == ["captured"]
    await customer.erase()
    await customer.api.refused("POST", f"/admin/v1/accounts/{uuid7()}/erase", 404, json=body)


async def test_the_trail_of_others_and_of_whoever_is_not_erased_stays_as_it_is(
    customer: Customer,
) -> None:
    """The exception that an erasure makes is for one account, and can do nothing but redact."""
    money = customer.money
    other = await customer.api.new_account(name="Other")
    with pytest.raises(psycopg.errors.RestrictViolation):
        money.all("UPDATE audit_trail SET detail = '{}' RETURNING 1")
    with money.connection.transaction():
        money.all("SELECT set_config('tallygate.erasing', %s, true)", other)
        with pytest.raises(psycopg.errors.RestrictViolation), money.connection.transaction():
            money.all("UPDATE audit_trail SET detail = '{}' RETURNING 1")
        changed = money.all(
            "UPDATE audit_trail SET actor = 'nobody', action = 'x', detail = '{}'"
            " WHERE account_id = %s RETURNING actor, action, detail",
            UUID(other),
        )
        with pytest.raises(psycopg.errors.RestrictViolation), money.connection.transaction():
            money.all("DELETE FROM audit_trail WHERE account_id = %s RETURNING 1", UUID(other))
    detail = {"name": "erased", "tier": "default", "credit_limit": 0}
    assert changed == [("admin", "account.create", detail)]
    # And an erasure leaves nothing behind that would let another one through.
    customer.close()
    with money.connection.transaction():
        money.all("SELECT erase_account(%s, %s, 'x', 'y')", money.account_id, uuid7())
        with pytest.raises(psycopg.errors.RestrictViolation), money.connection.transaction():
            money.all(
                "UPDATE audit_trail SET actor = 'x' WHERE account_id = %s RETURNING 1",
                money.account_id,
            )


async def test_details_keep_only_what_is_known_to_be_harmless(customer: Customer) -> None:
    detail = {
        "amount": 5, "is_it": True, "nothing": None, "key_id": "k", "reference": "inv-7",
        "name": PERSON, "reason": PERSON, "new_in_some_release": PERSON, "list": [PERSON],
        "object": {"name": PERSON}, "tier": ["no text"],
    }  # fmt: skip
    (redacted,) = customer.money.one("SELECT without_names(%s)", json.dumps(detail))
    assert redacted == {
        **detail, "name": "erased", "reason": "erased", "new_in_some_release": "erased",
        "list": "erased", "object": "erased", "tier": "erased",
    }  # fmt: skip
    assert customer.money.one("SELECT without_names('{}')") == ({},)


def test_somebody_has_decided_about_every_text(database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        rows = connection.execute(
            "SELECT c.relname || '.' || a.attname FROM pg_class AS c"
            " INNER JOIN pg_attribute AS a ON c.oid = a.attrelid AND a.attnum > 0"
            " INNER JOIN pg_type AS t ON a.atttypid = t.oid"
            " WHERE c.relnamespace = 'tallygate'::regnamespace AND c.relkind IN ('r', 'p')"
            " AND NOT c.relispartition AND NOT a.attisdropped"
            # Texts and JSON, addresses of networks, and lists of them.
            " AND (t.typcategory IN ('S', 'I') OR t.typname ~ 'text|json|cidr|inet|varchar')"
            " AND EXISTS (SELECT 1 FROM pg_attribute AS k"
            " WHERE k.attrelid = c.oid AND k.attname = 'account_id')"
        ).fetchall()
    impersonal = {f"{table}.{name}" for table, names in IMPERSONAL.items() for name in names}
    assert {row[0] for row in rows} == ERASED | KEPT_FOR_THE_BOOKS | impersonal
