"""The primary dies under load, its standby takes over, and nothing acknowledged is missing."""

from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from tests.chaos.campaign import wait_answers
from tests.chaos.house import House, stack
from tests.support.postgres import Cluster
from tests.support.standby import Standby, whichever_is_primary

__all__ = ["stack"]


def test_a_synchronous_standby_takes_over_and_nothing_acknowledged_is_lost(
    own_cluster: Cluster, tmp_path: Path, stack: ExitStack
) -> None:
    first = own_cluster.clone()
    name = urlsplit(first).path.lstrip("/")
    standby = Standby(own_cluster.server, own_cluster.directory / "standby")
    stack.callback(standby.stop)
    second = standby.server.url(name)
    house = House(
        tmp_path, database=first, through=whichever_is_primary(first, second), stack=stack
    )
    with house.crowd(customers=24) as journal:
        wait_answers(journal, 60)
        own_cluster.crash()
        standby.promote()
        house.database = second
        wait_answers(journal, 60)
    verdict = house.judge(journal)
    assert not verdict.failings
    assert verdict.acknowledged >= 120
