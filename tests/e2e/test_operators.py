"""What an operator stops is stopped on the very next call, whichever replica it reaches."""

from collections.abc import Callable, Iterator

import httpx
import pytest

from tests.e2e.conftest import Guest, House
from tests.support.litellm import MODELS
from tests.support.provider import FakeProvider
from tests.support.service import NO_TLS, Service, free_port

PAGE = "https://console.example.com"


@pytest.fixture(scope="module")
def first(make_house: Callable[..., House], provider_server: FakeProvider) -> House:
    """A service with the fake provider as its LiteLLM, and long memory for keys."""
    provider_server.deployments = [
        {"model_name": name, "litellm_params": {"model": f"openai/{name}"}, "model_info": info}
        for name, info in MODELS.items()
    ]
    environ = {
        "TALLYGATE_ADMISSION__PRINCIPAL_CACHE_S": "3600",
        "TALLYGATE_CORS__ALLOWED_ORIGINS": f'["{PAGE}"]',
    }
    return make_house(litellm_url=provider_server.root_url, environ=environ)


@pytest.fixture(scope="module")
def second(first: House) -> Iterator[House]:
    """Another one on the same database."""
    port = free_port()
    home = first.service.data_dir.parent
    other = Service(
        port=port,
        data_dir=home / "second",
        environ={
            **first.service.environ,
            "TALLYGATE_PORT": str(port),
            "TALLYGATE_DATA_DIR": str(home / "second"),
        },
        log_path=home / "second.log",
    )
    other.start()
    yield House(other, first.database_url)
    other.stop()


@pytest.fixture
def guests(first: House, second: House, provider: FakeProvider) -> list[Guest]:
    """One customer, on either replica."""
    del provider
    customer = first.customer().customer
    return [Guest(house, customer) for house in (first, second)]


def _codes(answers: list[httpx.Response]) -> list[tuple[int, str | None]]:
    return [
        (answer.status_code, answer.json()["error"]["code"] if answer.is_error else None)
        for answer in answers
    ]


def _chats(guests: list[Guest]) -> list[tuple[int, str | None]]:
    return _codes([guest.chat() for guest in guests])


def test_suspended_account_is_refused_by_every_replica_until_it_is_resumed(
    first: House, guests: list[Guest]
) -> None:
    assert _chats(guests) == 2 * [(200, None)]
    account = f"/admin/v1/accounts/{guests[0].customer.account_id}"
    first.service.admin("POST", f"{account}/suspend", {"reason": "r"})
    assert _chats(guests) == 2 * [(403, "account_suspended")]
    first.service.admin("POST", f"{account}/resume")
    assert _chats(guests) == 2 * [(200, None)]
    first.service.admin("POST", f"{account}/close", {"reason": "r"})
    assert [status for status, _ in _chats(guests)] == [401, 401]


@pytest.mark.parametrize("what", [{"model": "pri*d"}, {"provider": "openai"}])
def test_model_that_is_off_is_refused_by_every_replica_until_it_is_on(
    first: House, guests: list[Guest], provider: FakeProvider, what: dict[str, str]
) -> None:
    assert _chats(guests) == 2 * [(200, None)]
    asked = len(provider.requests)

    made = first.service.admin("POST", "/admin/v1/model-switches", {**what, "reason": "r"})
    assert _chats(guests) == 2 * [(403, "model_disabled")]
    body = {"model": "priced", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    for guest in guests:
        with guest.house.service.client(guest.customer.key) as client:
            free = [
                client.post("/v1/messages/count_tokens", json=body),
                client.post("/api/v1/estimate", json=body),
                client.get("/v1/models/priced"),
            ]
            assert [answer.status_code for answer in free] == [403, 403, 403]
            names = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert "priced" not in names
    assert len(provider.requests) == asked
    offered = first.service.admin("GET", "/admin/v1/models")["data"]
    (shown,) = [model for model in offered if model["name"] == "priced"]
    assert (shown["status"], shown["switch_id"]) == ("off", made["id"])
    assert (shown["providers"], shown["priced"]) == (["openai"], True)

    first.service.admin("DELETE", f"/admin/v1/model-switches/{made['id']}")
    # The other replica hears it first.
    assert _chats(guests[::-1]) == 2 * [(200, None)]


def test_model_that_is_off_leaves_the_others_on(first: House, guests: list[Guest]) -> None:
    body = {"model": "unpriced", "reason": "r"}
    made = first.service.admin("POST", "/admin/v1/model-switches", body)
    assert _chats(guests) == 2 * [(200, None)]
    first.service.admin("DELETE", f"/admin/v1/model-switches/{made['id']}")


def test_page_of_a_configured_origin_reads_an_answer(first: House) -> None:
    answer = httpx.get(
        f"{first.service.base_url}/v1/models", headers={"origin": PAGE}, verify=NO_TLS
    )
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, PAGE)
