"""What must hold whatever a customer makes of a call."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from psycopg import Connection
from psycopg.rows import DictRow, dict_row

from tests.e2e.conftest import Guest, House
from tests.support.calls import Call
from tests.support.litellm import AMBIENT_KEY, MASTER_KEY, PROVIDER_KEY
from tests.support.provider import FakeProvider, Received

# What attacks put where a credential, a header or an address is read.
EVIL = "evil-6f1d"
# Enough for all the calls of a module.
CREDITS = 10_000_000


@dataclass
class Surface:
    """A service, an attacker and a bystander on it, and the books."""

    house: House
    provider: FakeProvider
    client: httpx.Client
    database: Connection[DictRow]
    attacker: Guest
    bystander: Guest
    _usual: dict[str, int] = field(default_factory=dict[str, int])
    _posted: int = 0

    def usual_price(self, call: Call) -> int:
        """What the plain call costs, as the first one did."""
        if call.path not in self._usual:
            answer = call.send(self.client, self.bystander.customer.key)
            assert answer.status_code == 200, answer.text
            (row,) = self.usage(answer)
            assert row["status"] == "billed", row
            self._usual[call.path] = row["price"]
        return self._usual[call.path]

    def usage(self, answer: httpx.Response) -> list[dict[str, Any]]:
        """Return the usage row of an answer; none where it was refused before anything was held."""
        return self.database.execute(
            "SELECT * FROM tallygate.usage WHERE request_id = %s", [answer.headers["x-request-id"]]
        ).fetchall()

    def attack(
        self,
        call: Call,
        members: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Send a hostile call, then see that it changed nothing that is not its sender's.

        What was refused here can't have harmed anybody; ask for that once, after many of those.
        """
        self.begin(call)
        answer = call.send(self.client, self.attacker.customer.key, members, headers)
        self.assert_harmless(call, answer)
        return answer

    def begin(self, call: Call) -> None:
        """Note how things stand before an attack."""
        self.usual_price(call)
        self.provider.reset()
        self._posted = self._balance()["posted"]

    def assert_harmless(
        self, call: Call, answer: httpx.Response, *, same_price: bool = True
    ) -> None:
        """Price, route, credentials, books, and then another customer's service."""
        assert answer.status_code != 500, answer.text
        assert EVIL not in str(answer.headers)
        for received in self.provider.requests:
            self._assert_routed(call, received)
        assert len(self.provider.requests) <= 1
        if answer.status_code == 200:
            assert len(self.provider.requests) == 1, "an answer that no provider gave"
        price = self._assert_booked(
            answer, {"billed"} if same_price else {"billed", "needs_review"}
        )
        if same_price and answer.status_code == 200:
            assert price == self.usual_price(call)
        if self.provider.requests or answer.status_code != 400:
            self.assert_bystander_served(call)

    def assert_refused(
        self, call: Call, answer: httpx.Response, status: int = 400, param: str | None = None
    ) -> None:
        """Nothing was sent, nothing held, and the error names what is wrong."""
        assert answer.status_code == status, answer.text
        assert not self.provider.requests, call.path
        assert not self.usage(answer)
        if param is not None:
            assert answer.json()["error"]["param"] == param

    def assert_bystander_served(self, call: Call) -> None:
        """Another customer's plain call works as ever, at the price that it ever had."""
        usual = self.usual_price(call)
        answer = call.send(self.client, self.bystander.customer.key)
        assert answer.status_code == 200, answer.text
        (row,) = self.usage(answer)
        assert (row["status"], row["price"]) == ("billed", usual)
        self.provider.requests.clear()

    def _assert_routed(self, call: Call, received: Received) -> None:
        assert received.path in {call.path, *call.provider_paths}
        assert received.model == call.model
        assert credential(received) == PROVIDER_KEY
        said = str(received.headers)
        for secret in (AMBIENT_KEY, MASTER_KEY, EVIL, self.attacker.customer.key):
            assert secret not in said

    def _assert_booked(self, answer: httpx.Response, statuses: set[str]) -> int:
        rows = self.usage(answer)
        price = sum(row["price"] or 0 for row in rows)
        if answer.status_code == 200:
            assert len(rows) == 1
            assert rows[0]["status"] in statuses, rows
        else:
            assert price == 0
            assert [row["status"] for row in rows] in ([], ["void"]), rows
        assert self._balance() == {"posted": self._posted - price, "reserved": 0}
        return price

    def _balance(self) -> dict[str, int]:
        balance = self.database.execute(
            "SELECT posted, reserved FROM tallygate.balances WHERE account_id = %s",
            [self.attacker.customer.account_id],
        ).fetchone()
        assert balance is not None
        return balance


def credential(received: Received) -> str:
    """Return the key that the provider was shown, in whichever header."""
    if "x-api-key" in received.headers:
        assert "authorization" not in received.headers
        return received.headers["x-api-key"]
    scheme, _, key = received.headers["authorization"].partition(" ")
    assert scheme.lower() == "bearer"
    return key


@pytest.fixture(scope="module")
def surface(house: House, provider_server: FakeProvider) -> Iterator[Surface]:
    """The module's service with two customers."""
    provider_server.reset()
    with (
        httpx.Client(base_url=house.service.base_url, timeout=60) as client,
        Connection[DictRow].connect(
            house.database_url, autocommit=True, row_factory=dict_row
        ) as database,
    ):
        attacker, bystander = (house.customer(credits=str(CREDITS)) for _ in range(2))
        yield Surface(house, provider_server, client, database, attacker, bystander)
