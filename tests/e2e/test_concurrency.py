"""Many at once: nobody spends what is not there, on any number of workers."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import House
from tests.support.provider import FakeProvider, Gate, Reply

# A flat price, so that what an account affords does not depend on what is being answered.
FLAT = 'price_book: {default: {kind: flat, credits: "10", allow_loss: true}}\n'


@pytest.fixture(scope="module", params=[1, 2], ids=["one worker", "two workers"])
def flat(request: pytest.FixtureRequest, make_house: Callable[..., House]) -> House:
    """A service that sells every request for ten credits."""
    return make_house(config=FLAT, workers=request.param)


def test_fifty_at_once_on_an_account_that_affords_five(flat: House, provider: FakeProvider) -> None:
    guest = flat.customer(credits="50")
    gate = Gate()
    provider.reply("priced", Reply(gate=gate))
    with ThreadPoolExecutor(50) as pool:
        answers = [pool.submit(guest.chat) for _ in range(50)]
        gate.wait_reached()
        gate.open()
        statuses = Counter(answer.result().status_code for answer in answers)
    assert statuses == {200: 5, 402: 45}
    assert guest.balance() == (0, 0)
    after = flat.rows(
        "SELECT min(posted_after - reserved_after) AS least FROM entries WHERE account_id = %s",
        guest.customer.account_id,
    )
    assert after[0]["least"] == 0


def test_revoked_key_is_refused_by_every_worker_at_once(flat: House) -> None:
    guest = flat.customer()
    with ThreadPoolExecutor(16) as pool:  # warms the copies that each worker keeps
        warm = [pool.submit(guest.chat) for _ in range(32)]
        assert {answer.result().status_code for answer in warm} == {200}
    customer = guest.customer
    flat.service.admin("DELETE", f"/admin/v1/accounts/{customer.account_id}/keys/{customer.key_id}")
    with ThreadPoolExecutor(16) as pool:
        refused = [pool.submit(guest.chat) for _ in range(32)]
        assert {answer.result().status_code for answer in refused} == {401}


def test_limits_are_exact_across_workers(flat: House) -> None:
    guest = flat.customer(max_concurrency=3, credits="1000")
    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(guest.chat) for _ in range(40)]
        statuses = Counter(answer.result().status_code for answer in answers)
    assert set(statuses) <= {200, 429}
    assert statuses[200] >= 3
    most = flat.rows(
        "SELECT max(open) AS most FROM (SELECT sum(CASE WHEN kind = 'hold' THEN 1"
        " WHEN phase = 1 AND kind <> 'grant' THEN -1 ELSE 0 END) OVER (ORDER BY seq) AS open"
        " FROM entries WHERE account_id = %s) AS t",
        guest.customer.account_id,
    )
    assert 1 <= most[0]["most"] <= 3
