"""A restore to a point in time with the spool posted after it, and what is to be checked before."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import LiteralString
from uuid import UUID

import psycopg
import pytest

from proxy.audit import audit, audit_increment, check_seals
from proxy.backups import check_backup
from proxy.db import Session, make_pool, migrate
from proxy.doctor import Check
from proxy.embedded.postgres import EmbeddedPostgres
from proxy.ids import uuid7
from proxy.ledger import Ledger, Settlement
from proxy.seals import Seal, Sealer
from proxy.set_aside import Posted, SetAside, read_aside
from proxy.settlement import Settler
from proxy.spool import Spool
from tests.integration.money import Money, capture
from tests.support.postgres import make_server

pytestmark = pytest.mark.anyio

# Nobody listens there.
NOWHERE = "postgresql://postgres@127.0.0.1:1/none"


@dataclass
class Site:
    """A server that archives what it writes, and what is beside it."""

    home: Path
    server: EmbeddedPostgres

    @property
    def archive(self) -> Path:
        return self.home / "archive"

    def run(self, program: str, *arguments: str) -> None:
        """Run one of the server's own programs."""
        binaries = Path(f"/proc/{self.server.pid()}/exe").resolve().parent
        done = subprocess.run([binaries / program, *arguments], check=False, capture_output=True)
        assert done.returncode == 0, done.stderr

    def give(self, path: Path) -> None:
        """Make the server's user the owner."""
        owner = self.server.log_path.stat()
        for entry in (path, *path.rglob("*")):
            os.chown(entry, owner.st_uid, owner.st_gid)


@pytest.fixture
def site() -> Iterator[Site]:
    home = Path(tempfile.mkdtemp(prefix="tallygate-backup-"))
    home.chmod(0o711)
    made = Site(
        home,
        make_server(
            home / "first",
            archive_mode="on",
            archive_command=f"test ! -f {home}/archive/%f && cp %p {home}/archive/%f",
            archive_timeout="60s",
        ),
    )
    try:
        made.server.start()
        made.archive.mkdir()
        made.give(made.archive)
        migrate(made.server.url())
        yield made
    finally:
        with suppress(ProcessLookupError):
            made.server.stop()
        shutil.rmtree(home)


def look(url: str, data_dir: Path, kept: list[Seal] | None = None) -> dict[str, Check]:
    return {check.name: check for check in check_backup(url, data_dir, kept)}


def bad(checks: Mapping[str, Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks.values() if check.status != "ok"}


async def seal(url: str) -> Seal:
    async with make_pool(url, max_size=1) as pool:
        made = await Sealer(pool).seal()
    assert made is not None
    return made


def settlement(request: dict[str, object], price: int, **changes: object) -> Settlement:
    values = {
        **capture(request, price, model_answered="model-2", **changes),
        "account_id": UUID(str(request["account_id"])),
        "request_id": UUID(str(request["request_id"])),
    }
    return Settlement(**values)  # pyright: ignore[reportArgumentType]


async def spool_up(directory: Path, *settlements: Settlement) -> None:
    """Settle while PostgreSQL is away, in a process that ends before it is back."""
    lane, replay = Session(NOWHERE, timeout_s=1), Session(NOWHERE, timeout_s=1)
    settler = Settler([lane], replay, Spool(directory), nanos_per_credit=1_000_000)
    for one in settlements:
        assert (await settler.settle(one)).outcome == "spooled"
    await settler.drain()
    await lane.close()


async def replay_spool(url: str, directory: Path) -> int:
    """Do what the service does when it starts."""
    session = Session(url, timeout_s=10)
    settler = Settler([session], session, Spool(directory), nanos_per_credit=1_000_000)
    replayed = await settler.replay()
    await settler.drain()
    return replayed


async def post(url: str, spool: Spool) -> list[Posted]:
    session = Session(url, timeout_s=10)
    async with make_pool(url, max_size=1) as pool:
        ledger = Ledger(url, pool)
        posted = await SetAside(spool, session, pool, ledger).post(read_aside(spool), actor="test")
        await ledger.close()
    await session.close()
    return posted


def base_backup(site: Site) -> Path:
    """Copy the server while it runs."""
    socket_dir = str(site.server.pgdata)
    copy = site.home / "copy"
    site.run(
        "pg_basebackup", "-h", socket_dir, "-U", "postgres", "-D", str(copy), "-c", "fast"
    )  # fmt: skip
    return copy


def archive_everything(money: Money) -> None:
    """Return once what was written is in the archive."""
    (segment,) = money.one("SELECT pg_walfile_name(pg_switch_wal())")
    while not money.one(
        "SELECT coalesce(max(last_archived_wal) >= %s, false) FROM pg_stat_archiver", segment
    )[0]:
        money.all("SELECT pg_sleep(0.02)")


def fail_to_archive(money: Money) -> None:
    """Return once the archive has refused something; from then on it takes it again."""
    money.connection.execute("ALTER SYSTEM SET archive_command = 'false'")
    money.all("SELECT pg_reload_conf(), pg_switch_wal()")
    while not money.one("SELECT failed_count > 0 FROM pg_stat_archiver")[0]:
        money.all("SELECT pg_sleep(0.02)")
    money.connection.execute("ALTER SYSTEM RESET archive_command")


def restore(site: Site, copy: Path, until: str) -> EmbeddedPostgres:
    """Start a server from the copy and the archive, as it was at that moment."""
    restored = make_server(
        site.home / "restored",
        restore_command=f"cp {site.archive}/%f %p",
        recovery_target_time=until,
    )
    restored.data_dir.mkdir()
    copy.rename(restored.pgdata)
    (restored.pgdata / "recovery.signal").touch()
    site.give(restored.pgdata)
    restored.start()
    return restored


def wait(url: str, query: LiteralString) -> None:
    """Return once the server answers `true`."""
    with closing(psycopg.connect(url, autocommit=True)) as connection:
        while not connection.execute(query).fetchall()[0][0]:
            connection.execute("SELECT pg_sleep(0.02)")


def promote(url: str) -> None:
    """Take what was restored for the ledger from now on."""
    with closing(psycopg.connect(url, autocommit=True)) as connection:
        connection.execute("SELECT pg_wal_replay_resume()")
    wait(url, "SELECT NOT pg_is_in_recovery()")


@dataclass
class Story:
    """What happened before the restore."""

    copy: Path
    # The moment that is restored.
    until: str
    kept: list[Seal]
    # Whose holds came after that moment; the fee is for a key of the customer's own.
    charged: dict[str, object]
    fee: dict[str, object]


async def live(site: Site, money: Money, data_dir: Path) -> Story:
    """Do business, be backed up, and meet with a mistake that PostgreSQL can't take back."""
    url = site.server.url()
    money.one("SELECT publish_price_book('{}', 1000000, %s, 'test')", uuid7())
    money.settle(capture(money.hold(100), 60))
    kept = [await seal(url)]
    copy = base_backup(site)
    settled, open_ = money.hold(100), money.hold(100)
    money.settle(capture(settled, 70))
    (until,) = money.one("SELECT clock_timestamp()::text")
    lost, charged, fee = money.hold(100), money.hold(100), money.hold(0, byok=True)
    money.settle(capture(lost, 50))
    kept.append(await seal(url))
    money.one("SELECT record_audit(%s, 'full', 2, 0, 1, 1)", uuid7())
    archive_everything(money)
    assert bad(look(url, data_dir, kept)) == {}

    money.connection.execute("DROP TABLE entries CASCADE")
    archive_everything(money)
    await spool_up(
        data_dir / "spool",
        *(settlement(settled, 70), settlement(open_, 80)),
        *(settlement(charged, 40), settlement(charged, 40)),
        settlement(fee, 5, status="byok"),
    )
    assert bad(look(url, data_dir, kept))["spool"] == "warn"
    fail_to_archive(money)
    assert bad(look(url, data_dir, kept))["last_archived"] == "fail"
    return Story(copy, until, kept, charged, fee)


def is_clean(url: str) -> bool:
    return not any(found.violations for found in (*audit(url), *audit_increment(url).findings))


async def test_a_restore_to_a_point_in_time_gets_the_spool_after_it(site: Site) -> None:
    data_dir = site.home / "service"
    spool = Spool(data_dir / "spool")
    money = Money(site.server.url(), funds=1000)
    story = await live(site, money, data_dir)
    money.connection.close()
    site.server.stop()
    shutil.rmtree(site.server.pgdata)
    restored = restore(site, story.copy, story.until)
    try:
        url = restored.url()
        wait(url, "SELECT pg_get_wal_replay_pause_state() = 'paused'")
        assert is_clean(url)
        assert look(url, data_dir)["postgresql"].found == "this is a standby"
        promote(url)

        # Charged: what was held at that moment. Not twice: what was charged by then. The rest has
        # lost its hold, and waits for a human.
        assert await replay_spool(url, data_dir / "spool") == 5
        money.connection = psycopg.connect(url, autocommit=True)
        money.connection.execute("SET search_path = tallygate")
        assert money.balance() == (1000 - 60 - 70 - 80, 0, 0)
        assert spool.rejected() == 3
        assert look(url, data_dir)["rejected_settlements"].status == "fail"
        assert is_clean(url)

        posted = await post(url, spool)
        assert [one.outcome for one in posted] == ["charged", "already_captured", "charged"]
        assert spool.rejected() == 0
        assert money.balance() == (1000 - 60 - 70 - 80 - 40 - 5, 0, 0)
        row = money.usage(story.charged)
        assert (row["status"], row["price"], row["model"]) == ("billed", 40, "model-2")
        assert row["cost_picos"] == 20_000
        assert money.usage(story.fee)["status"] == "byok"
        assert is_clean(url)

        # What was written after that moment is known to be missing, by what was kept elsewhere.
        sealed = check_seals(url, kept=story.kept)
        broken = {found.name: found.rows for found in sealed.findings if found.violations}
        assert set(broken) == {"seals_as_kept"}
        assert [row["seal"] for row in broken["seals_as_kept"]] == [2]
        assert look(url, data_dir, story.kept)["kept_seals"].status == "fail"
    finally:
        money.connection.close()
        restored.stop()
