"""A hold whose placing was committed and never acknowledged: nobody is served, nobody charged."""

from collections.abc import Iterator

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.chaos.pgwire import PostgresWire
from tests.e2e.conftest import CHAT, wait_for
from tests.support.litellm import MODELS
from tests.support.provider import FakeProvider
from tests.support.service import ServiceFactory


@pytest.fixture
def wire(database_url: str) -> Iterator[PostgresWire]:
    """The network before the test's PostgreSQL."""
    wire = PostgresWire(f"{conninfo_to_dict(database_url)['host']}/.s.PGSQL.5432").start()
    yield wire
    wire.stop()


def test_hold_in_doubt_is_voided(
    wire: PostgresWire, service: ServiceFactory, database_url: str, provider: FakeProvider
) -> None:
    database = conninfo_to_dict(database_url)["dbname"]
    provider.deployments = [
        {"model_name": name, "litellm_params": {"model": f"openai/{name}"}, "model_info": info}
        for name, info in MODELS.items()
    ]
    running = service(
        database_url=f"postgresql://postgres@127.0.0.1:{wire.port}/{database}?sslmode=disable",
        litellm_url=provider.root_url,
    )
    customer = running.new_key()
    wire.lose_commits(2)  # the answer, and that of the attempt that asks again
    with running.client(customer.key) as client:
        message = {"role": "user", "content": "hi"}
        answer = client.post(CHAT, json={"model": "priced", "messages": [message]})
    assert (answer.status_code, wire.lost) == (503, 2)
    assert provider.requests == []
    with psycopg.connect(database_url, autocommit=True) as connection:
        ends = "SELECT kind FROM tallygate.entries WHERE phase IN (0, 1) AND kind <> 'grant'"
        wait_for(lambda: len(connection.execute(ends).fetchall()) == 2, "the hold's end")
        assert {row[0] for row in connection.execute(ends)} == {"hold", "void"}
        row = connection.execute("SELECT posted, reserved FROM tallygate.balances").fetchone()
    assert row == (1_000_000_000, 0)
