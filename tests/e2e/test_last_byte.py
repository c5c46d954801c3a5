"""Durable before done: the last bytes of an answer wait until its charge is settled."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from tests.e2e.conftest import Guest, House, wait_for
from tests.support.litellm import MODELS
from tests.support.provider import FakeProvider, Gate, Reply


@pytest.fixture(scope="module")
def direct(make_house: Callable[..., House], provider_server: FakeProvider) -> House:
    """A service whose LiteLLM is the fake provider."""
    provider_server.deployments = [
        {"model_name": name, "litellm_params": {"model": f"openai/{name}"}, "model_info": info}
        for name, info in MODELS.items()
    ]
    return make_house(litellm_url=provider_server.root_url)


@pytest.mark.parametrize("stream", [False, True])
def test_answer_is_not_complete_before_its_charge_is_committed(
    direct: House,
    provider: FakeProvider,
    stream: bool,  # noqa: FBT001
) -> None:
    guest: Guest = direct.customer()
    gate = Gate(after_chunks=2 if stream else 0)
    cost = {"x-litellm-response-cost": "6e-05"}
    provider.reply("priced", Reply(gate=gate, headers=cost))
    with ThreadPoolExecutor(1) as pool, psycopg.connect(direct.database_url) as other:
        answer = pool.submit(guest.chat, stream=stream)
        gate.wait_reached()
        # Nothing of this account can be settled until we let go of its balance.
        other.execute("SELECT FROM tallygate.balances FOR NO KEY UPDATE")
        gate.open()
        wait_for(lambda: _is_somebody_waiting(direct), "the settlement to begin")
        # Time enough for bytes that nobody holds back to come.
        with pytest.raises(TimeoutError):
            answer.result(timeout=0.5)
        other.rollback()
        assert answer.result(timeout=30).status_code == 200
    assert guest.usage()["status"] == "billed"


def _is_somebody_waiting(house: House) -> bool:
    (row,) = house.rows("SELECT count(*) AS n FROM pg_locks WHERE NOT granted")
    return row["n"] > 0
