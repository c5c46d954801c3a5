"""The service behind the real PgBouncer in transaction mode, with fewer backends than clients."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import msgspec
import psycopg
import pytest

from proxy.audit import audit, audit_increment, check_seals
from proxy.db import CONNECTION_ERRORS, Session, require_schema
from proxy.doctor import LedgerExpectations, check_database
from proxy.errors import ConfigurationError
from proxy.ids import uuid7
from tests.chaos.accounts import Account
from tests.chaos.campaign import wait_answers
from tests.chaos.house import House, stack
from tests.chaos.stage import wait_for
from tests.support.pgbouncer import PgBouncer
from tests.support.postgres import Cluster
from tests.support.service import ROOT

__all__ = ["stack"]

LOGIN = "tallygate_service"
BACKENDS = 3


@dataclass
class Pooled:
    """A database, and the pooler before it."""

    database: str
    bouncer: PgBouncer

    @property
    def url(self) -> str:
        return self.bouncer.url(LOGIN)


@pytest.fixture
def pooled(postgres: Cluster, database_url: str) -> Iterator[Pooled]:
    """PgBouncer with the login that deploy/ has a script for."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute((ROOT / "deploy" / "service_login.sql").read_bytes())
        connection.execute(f"ALTER ROLE {LOGIN} PASSWORD 'secret'".encode())
        bouncer: PgBouncer | None = None
        try:
            bouncer = PgBouncer(
                postgres.directory / f"pgbouncer-{uuid7()}",
                database_url,
                passwords={LOGIN: "secret", "postgres": "secret"},
                pool=BACKENDS,
            )
            yield Pooled(database_url, bouncer)
        finally:
            if bouncer is not None:
                bouncer.stop()
            # A role belongs to the cluster, which other tests use as well.
            connection.execute(f"DROP ROLE {LOGIN}".encode())


def abandon(database: str, account: Account) -> UUID:
    """Place a hold that is overdue, and that nobody will end."""
    request_id = uuid7()
    hold = {
        "account_id": account.account_id,
        "request_id": request_id,
        "key_id": account.key_id,
        "version": 2,
        "amount": 1000,
        "tokens": 1,
        "ttl_s": -1,
        "endpoint": "chat",
        "model": "m",
        "tier": "default",
        "streamed": False,
        "byok": False,
        "price_version": 1,
    }
    with psycopg.connect(database) as connection:
        connection.execute("SET search_path = tallygate")
        ((outcome,),) = connection.execute(
            "SELECT outcome FROM authorize_batch(%s)", (msgspec.json.encode([hold]).decode(),)
        ).fetchall()
    assert outcome == "held"
    return request_id


def operate(house: House) -> None:
    """Do what an operator and a customer do over the other two APIs."""
    account = house.accounts[0]
    path = f"/admin/v1/accounts/{account.account_id}"
    key = house.service.admin("POST", f"{path}/keys", {"name": "another"})
    grant = {"credits": "1", "reason": "test", "reference": str(uuid7())}
    house.service.admin("POST", f"{path}/grants", grant)
    account.funded += 1_000_000
    for listed in ("usage", "ledger", "keys", "balance"):
        house.service.admin("GET", f"{path}/{listed}")
    with house.service.client(account.key) as client:
        for read in ("balance", "usage", "ledger", "keys"):
            assert client.get(f"/api/v1/{read}").status_code == 200
        (row, *_) = client.get("/api/v1/usage?limit=1").json()["data"]
        assert client.get(f"/api/v1/usage/{row['request_id']}").status_code == 200
    house.service.admin("DELETE", f"{path}/keys/{key['id']}")


def left_behind(url: str) -> set[str]:
    """Look into every backend at once for what a session has left there."""

    def look(_: int) -> list[tuple[str]]:
        with psycopg.connect(url) as connection:
            return connection.execute(
                "SELECT s.name FROM pg_settings AS s, pg_sleep(0.2) WHERE s.source = 'session'"
                " AND s.name <> ALL(%s) UNION ALL SELECT p.name FROM pg_prepared_statements AS p",
                (["application_name", "transaction_isolation", "transaction_read_only"],),
            ).fetchall()

    with ThreadPoolExecutor(BACKENDS) as threads:
        return {name for rows in threads.map(look, range(BACKENDS)) for (name,) in rows}


def test_service_keeps_its_promises_behind_a_transaction_pooler(
    pooled: Pooled, tmp_path: Path, stack: ExitStack
) -> None:
    house = House(tmp_path, database=pooled.database, through=pooled.url, stack=stack)
    orphan = abandon(pooled.database, house.accounts[1])
    with house.crowd(customers=24) as journal:
        wait_answers(journal, 40)
        clients, backends = pooled.bouncer.connections(LOGIN)
        assert clients > 2 * BACKENDS
        assert 0 < backends <= BACKENDS
        for _ in range(12):  # psycopg names a statement at a connection's sixth use of it
            operate(house)
        for findings in (
            audit(pooled.url),
            audit_increment(pooled.url, page_entries=50).findings,
            check_seals(pooled.url).findings,
        ):
            assert not [finding for finding in findings if finding.violations]
        wait_answers(journal, 40)
        assert not left_behind(pooled.url)
    verdict = house.judge(journal)
    assert not verdict.failings
    assert verdict.acknowledged >= 80
    wait_for(lambda: _status(pooled.database, orphan) == "needs_review", "the sweeper")
    assert "PoolTimeout" not in house.service.log()


def _status(database: str, request_id: UUID) -> str | None:
    with psycopg.connect(database) as connection:
        row = connection.execute(
            "SELECT status FROM tallygate.usage WHERE request_id = %s", (request_id,)
        ).fetchone()
    return None if row is None else row[0]


@pytest.mark.anyio
async def test_login_that_brings_nothing_along_is_refused_behind_a_pooler(pooled: Pooled) -> None:
    url = pooled.bouncer.url("postgres")
    with pytest.raises(ConfigurationError, match=r"service_login\.sql"):
        require_schema(url)
    session = Session(url, timeout_s=5)
    with pytest.raises(CONNECTION_ERRORS):
        await session.fetch("SELECT 1", ())
    assert _doctor_on_pooler(url) == "fail"
    require_schema(pooled.url)
    assert _doctor_on_pooler(pooled.url) == "ok"
    session = Session(pooled.url, timeout_s=5)
    assert await session.fetch("SELECT current_user, current_schema()", ()) == [
        (LOGIN.encode(), b"tallygate")
    ]
    await session.close()


def _doctor_on_pooler(url: str) -> str:
    expected = LedgerExpectations(nanos_per_credit=1_000_000, price_book={}, sweep_grace_s=60)
    (status,) = [each.status for each in check_database(url, expected) if each.name == "pooler"]
    return status


@pytest.mark.anyio
async def test_statement_given_up_behind_a_pooler_is_not_carried_out_later(pooled: Pooled) -> None:
    account = Account(pooled.database, "waiting")
    session = Session(pooled.url, timeout_s=0.5)
    with psycopg.connect(pooled.database) as blocker:
        blocker.execute(
            "SELECT 1 FROM tallygate.balances WHERE account_id = %s FOR UPDATE",
            (account.account_id,),
        )
        with pytest.raises(CONNECTION_ERRORS):
            await session.fetch(
                "SELECT outcome FROM fund($1, $2, 'grant', 5, 's', 'r', 'r', 'a')",
                (str(account.account_id), str(uuid7())),
            )
        wait_for(lambda: not _waiting(pooled.database), "the backend to notice")
    with psycopg.connect(pooled.database) as connection:
        assert connection.execute("SELECT sum(posted) FROM tallygate.balances").fetchone() == (0,)
    await session.close()


def _waiting(database: str) -> bool:
    with psycopg.connect(database) as connection:
        found = connection.execute(
            "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND usename = %s",
            (LOGIN,),
        )
        return bool(found.fetchall())
