"""One service a test module, with a real LiteLLM behind it and the fake provider behind that."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import psycopg
import pytest
from psycopg.rows import dict_row

from tests.support.litellm import RunningLiteLLM
from tests.support.postgres import Cluster
from tests.support.provider import FakeProvider
from tests.support.service import NO_TLS, Customer, Service, prepare_service

CHAT = "/v1/chat/completions"


@dataclass
class House:
    """A running service and what stands around it."""

    service: Service
    database_url: str
    clients: list[openai.OpenAI] = field(default_factory=list[openai.OpenAI])

    def customer(self, **options: Any) -> "Guest":
        """Make an account with a key."""
        return Guest(self, self.service.new_key(**options))

    def rows(self, query: str, *parameters: object) -> list[dict[str, Any]]:
        """Read the database."""
        with (
            psycopg.connect(self.database_url) as connection,
            connection.cursor(row_factory=dict_row) as cursor,
        ):
            cursor.execute("SET search_path = tallygate")
            return cursor.execute(query.encode(), parameters).fetchall()


@dataclass
class Guest:
    """A customer of a house, with a client for raw HTTP and the OpenAI SDK."""

    house: House
    customer: Customer

    def chat(self, *, http_headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        """Send a chat completion; `model` is priced and the message short unless told otherwise."""
        document = {
            "model": "priced",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 50,
        } | body
        with self.house.service.client(self.customer.key) as client:
            return client.post(CHAT, json=document, headers=http_headers)

    def get(self, path: str) -> Any:
        """Read from the account API."""
        with self.house.service.client(self.customer.key) as client:
            answer = client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def sdk(self, **options: Any) -> openai.OpenAI:
        """The official SDK pointed at the service; no retries, so that a test sees each answer."""
        options.setdefault("max_retries", 0)
        client = openai.OpenAI(
            base_url=f"{self.house.service.base_url}/v1", api_key=self.customer.key, **options
        )
        self.house.clients.append(client)
        return client

    def usage(self, *, count: int = 1) -> dict[str, Any]:
        """Return the newest usage row as the database has it; there must be `count` in all."""
        rows = self.house.rows(
            "SELECT * FROM usage WHERE account_id = %s ORDER BY request_id DESC",
            self.customer.account_id,
        )
        assert len(rows) == count, rows
        return rows[0]

    def balance(self) -> tuple[int, int]:
        """Posted and reserved, in nano-USD."""
        (row,) = self.house.rows(
            "SELECT posted, reserved FROM balances WHERE account_id = %s", self.customer.account_id
        )
        return row["posted"], row["reserved"]

    def wait_settled(self, *, count: int = 1) -> None:
        """Wait until `count` requests of the account have ended."""
        wait_for(
            lambda: (
                len(
                    self.house.rows(
                        "SELECT 1 FROM usage WHERE account_id = %s", self.customer.account_id
                    )
                )
                >= count
            ),
            "the settlement",
        )

    def uncharged(self) -> bool:
        """Whether the account is as it was: nothing taken, nothing held."""
        return self.balance() == (1_000_000_000, 0)


def wait_for(condition: Callable[[], bool], what: str, *, timeout_s: float = 30) -> None:
    """Wait for something that happens in another process."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def _listens(service: Service) -> bool:
    try:
        return httpx.get(f"{service.base_url}/livez", timeout=2, verify=NO_TLS).is_success
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def make_house(
    postgres: Cluster,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., House]]:
    """Start services on databases of their own; `litellm_url` replaces the real LiteLLM."""
    made: list[House] = []

    def make(*, litellm_url: str | None = None, wait: bool = True, **options: Any) -> House:
        key = "sk-unused"
        if litellm_url is None:
            litellm: RunningLiteLLM = request.getfixturevalue("litellm")
            litellm_url, key = litellm.url, litellm.key
        url = postgres.clone()
        service = prepare_service(
            tmp_path_factory.mktemp("service"),
            database_url=url,
            litellm_url=litellm_url,
            litellm_key=key,
            **options,
        )
        made.append(House(service, url))
        service.start(wait=wait)
        if not wait:
            wait_for(lambda: _listens(service), "the service to listen")
        return made[-1]

    yield make
    for house in made:
        for client in house.clients:
            client.close()
        house.service.stop()
        postgres.drop(house.database_url)


@pytest.fixture(scope="module")
def house(make_house: Callable[..., House]) -> House:
    """A service with the default settings and the real LiteLLM."""
    return make_house()


@pytest.fixture
def guest(house: House, provider: FakeProvider) -> Guest:
    """A customer with 1000 credits, which are one dollar, and a provider without scripts."""
    del provider  # asked for so that no other test's scripts are left
    return house.customer()
