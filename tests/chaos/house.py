"""A house: one service with its customers and its judge, on a database that a test has built."""

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import pytest

from tests.chaos.accounts import Account
from tests.chaos.customers import NANOS_PER_CREDIT, Order
from tests.chaos.stage import CONFIG, LITELLM_KEY, SETTINGS, StandIn, crowd, wait_for
from tests.chaos.verdict import Judge, Verdict
from tests.support.service import Service, prepare_service


class House:
    """Two workers that reach PostgreSQL by one URL, while we look at it by another."""

    def __init__(self, home: Path, *, database: str, through: str, stack: ExitStack) -> None:
        self.database = database
        self._home = home
        self._provider = StandIn(home)
        stack.callback(self._provider.close)
        self._provider.start()
        self.service: Service = prepare_service(
            home,
            database_url=through,
            litellm_url=self._provider.url,
            litellm_key=LITELLM_KEY,
            workers=2,
            environ=SETTINGS,
            config=CONFIG,
        )
        stack.callback(self.service.close)
        self.service.start()
        self.accounts = [Account(database, f"rich-{number}") for number in range(3)]
        for account in self.accounts:
            account.fund(10**6 * NANOS_PER_CREDIT)

    @contextmanager
    def crowd(self, *, customers: int, pause_ms: float = 60) -> Generator[Path]:
        """Have customers call while the context lasts; yields their journal."""
        order = Order(
            urls=[self.service.base_url],
            keys=[account.key for account in self.accounts],
            seed=1,
            customers=customers,
            pause_ms=pause_ms,
            name="crowd",
            failures=["error", "cut"],
            long=0.0,
        )
        with crowd(self._home, order) as journal:
            yield journal

    def judge(self, journal: Path) -> Verdict:
        """Wait until every hold has ended, and judge."""
        spool = self.service.data_dir / "spool"

        def is_settled() -> bool:
            if any(path.stat().st_size for path in spool.glob("*.spool")):
                return False
            with psycopg.connect(self.database) as connection:
                found = connection.execute("SELECT 1 FROM tallygate.open_holds LIMIT 1")
                return not found.fetchall()

        wait_for(is_settled, "holds to end and the spool to be replayed")
        judge = Judge(self.database, self.accounts, self._provider.journal, [spool])
        return judge.judge([journal])


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What ends in the other order when the test does."""
    with ExitStack() as opened:
        yield opened
