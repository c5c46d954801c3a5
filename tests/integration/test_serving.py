"""What `tallygate serve` makes sure of before it serves."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from proxy.db import make_pool, migrate
from proxy.errors import ConfigurationError
from proxy.price_books import PriceBooks
from proxy.serving import prepare, wait_for_port, wait_for_schema
from tests.support.service import free_port


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken


def test_a_port_that_is_taken_is_named_with_the_way_out(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with pytest.raises(ConfigurationError, match=rf"port {port} .* TALLYGATE_PORT"):
        wait_for_port("127.0.0.1", port, timeout_s=0)


def test_a_port_that_is_let_go_in_time_is_taken(listener: socket.socket) -> None:
    closer = threading.Timer(0.3, listener.close)
    closer.start()
    wait_for_port("127.0.0.1", listener.getsockname()[1], timeout_s=10)
    closer.join()


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(ConfigurationError, match="TALLYGATE_HOST"):
        wait_for_port("192.0.2.1", 4000, timeout_s=0)


def test_a_missing_schema_is_said_at_once(empty_database_url: str) -> None:
    with pytest.raises(ConfigurationError, match="tallygate migrate"):
        wait_for_schema(empty_database_url, timeout_s=60)
    migrate(empty_database_url)
    wait_for_schema(empty_database_url, timeout_s=60)


def test_a_server_that_does_not_come_is_given_up_on() -> None:
    with pytest.raises(ConfigurationError, match="can't be reached"):
        wait_for_schema("postgresql://127.0.0.1:1/nothing", timeout_s=0.3)


def test_another_worth_of_a_credit_is_refused(database_url: str, tmp_path: Path) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("SELECT tallygate.freeze_nanos_per_credit(5)")
    done = serve(database_url, tmp_path)
    assert done.returncode == 2
    assert "credit_usd is 0.001" in done.stderr
    assert "has it fixed at 0.000000005: set it back" in done.stderr


def test_a_price_book_that_makes_no_sense_is_refused(database_url: str, tmp_path: Path) -> None:
    book = '{"default": {"kind": "markup", "factor": "0.5"}}'
    done = serve(database_url, tmp_path, TALLYGATE_PRICE_BOOK=book)
    assert done.returncode == 2
    assert "price_book in the configuration is wrong: default" in done.stderr


def test_a_service_without_its_supervisor_does_not_start(database_url: str, tmp_path: Path) -> None:
    done = serve(database_url, tmp_path, TALLYGATE_SUPERVISOR_PID="1")
    assert done.returncode == 1
    assert "is gone" in done.stderr


def serve(url: str, data_dir: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `tallygate serve` that is expected to refuse."""
    own: Mapping[str, str] = {n: v for n, v in os.environ.items() if not n.startswith("TALLYGATE_")}
    return subprocess.run(
        [sys.executable, "-m", "proxy.cli", "serve", "--port", str(free_port())],
        env={
            **own,
            "TALLYGATE_DATABASE_URL": url,
            "TALLYGATE_LITELLM_URL": "http://127.0.0.1:1",
            "TALLYGATE_DATA_DIR": str(data_dir),
            **environ,
        },
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.anyio
async def test_example_of_the_package_does_not_replace_a_published_price_book(
    database_url: str,
) -> None:
    own = {"default": {"kind": "markup", "factor": "3.0"}}
    example = {"default": {"kind": "markup", "factor": "2.0"}}
    pool = make_pool(database_url)
    await pool.open()
    books = PriceBooks(pool)
    await prepare(database_url, 1_000_000, own, is_packaged=False)
    await prepare(database_url, 1_000_000, example, is_packaged=True)
    assert (await books.refresh()).version == 1
    await prepare(database_url, 1_000_000, example, is_packaged=False)
    assert (await books.refresh()).version == 2
    await pool.close()


OWN = {"default": {"kind": "markup", "factor": "3.0"}}
OPERATORS = {"default": {"kind": "markup", "factor": "4.0"}}
CREDIT = 1_000_000


@pytest.mark.anyio
async def test_a_restart_does_not_undo_what_an_operator_published(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with make_pool(database_url) as pool:
        books = PriceBooks(pool)
        await prepare(database_url, CREDIT, OWN, is_packaged=False)
        await books.publish(OPERATORS, nanos_per_credit=CREDIT, actor="ada")
        await prepare(database_url, CREDIT, OWN, is_packaged=False)
        assert (await books.refresh()).version == 2
        assert not caplog.records

        # A changed configuration is another matter, even one that says what is in force: the
        # next restart must know that it has said so.
        await prepare(database_url, CREDIT, OPERATORS, is_packaged=False)
        assert (await books.refresh()).version == 3
        assert [record.message for record in caplog.records] == ["price book published"]
        await books.publish(OWN, nanos_per_credit=CREDIT, actor="ada")
        await prepare(database_url, CREDIT, OPERATORS, is_packaged=False)
        assert (await books.refresh()).version == 4


@pytest.mark.anyio
async def test_another_worth_of_a_credit_reaches_every_version_that_is_or_will_be_in_force(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    async with make_pool(database_url) as pool:
        books = PriceBooks(pool)
        await prepare(database_url, CREDIT, OWN, is_packaged=False)
        await books.publish(OPERATORS, nanos_per_credit=CREDIT, actor="ada")
        await books.publish(OWN, nanos_per_credit=CREDIT, actor="ada", valid_from=later)
        with psycopg.connect(database_url) as owner:
            owner.execute("UPDATE tallygate.meta SET value = '5' WHERE name = 'nanos_per_credit'")
        for _ in range(2):
            await prepare(database_url, 5, OWN, is_packaged=False)
        rows = await books.versions(before=None, limit=9)
    assert [
        (row["version"], row["state"], row["nanos_per_credit"], row["published_by"]) for row in rows
    ] == [
        (5, "scheduled", 5, "ada"),
        (4, "in_force", 5, "ada"),
        (3, "overtaken", CREDIT, "ada"),
        (2, "past", CREDIT, "ada"),
        (1, "past", CREDIT, "config"),
    ]
    assert (rows[0]["valid_from"], rows[0]["document"]) == (later, rows[2]["document"])
    assert rows[1]["document"] == rows[3]["document"]
    (record,) = caplog.records
    assert record.message.startswith("price book published again")
