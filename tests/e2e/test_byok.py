"""Bring your own key: credits are bypassed, usage is recorded, the key is nobody's."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import Guest, House
from tests.support.provider import FakeProvider, Reply

OWN_KEY = "sk-the-customers-own-provider-key"
WITH_OWN_KEY = {"X-Provider-Key": OWN_KEY}


@pytest.mark.parametrize("header", ["X-Provider-Key", "X-OpenAI-Key"])
@pytest.mark.parametrize("stream", [False, True])
def test_call_goes_out_with_the_customers_key_and_costs_no_credits(
    house: House,
    provider: FakeProvider,
    header: str,
    stream: bool,  # noqa: FBT001
) -> None:
    guest = house.customer(credits="0")
    answer = guest.chat(http_headers={header: OWN_KEY}, stream=stream)
    assert answer.status_code == 200, answer.text
    assert provider.last().headers["authorization"] == f"Bearer {OWN_KEY}"
    row = guest.usage()
    assert (row["status"], row["price"], row["byok"], row["output_tokens"]) == ("byok", 0, True, 5)
    assert guest.balance() == (0, 0)


def test_blank_key_is_refused(guest: Guest, provider: FakeProvider) -> None:
    answer = guest.chat(http_headers={"X-Provider-Key": ""})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "blank_provider_key")
    assert not provider.requests
    assert guest.uncharged()


def test_key_for_another_provider_is_left_alone(guest: Guest, provider: FakeProvider) -> None:
    assert guest.chat(http_headers={"X-Anthropic-Key": OWN_KEY}).status_code == 200
    assert OWN_KEY not in str(provider.last())
    assert guest.usage()["status"] == "billed"


def test_refused_key_is_401_in_words_that_blame_the_right_one(
    guest: Guest, provider: FakeProvider
) -> None:
    provider.reply("priced", Reply(status=401))
    answer = guest.chat(http_headers=WITH_OWN_KEY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_provider_key")
    assert OWN_KEY not in answer.text


def test_key_is_stored_and_logged_nowhere(house: House) -> None:
    guest = house.customer()
    guest.chat(http_headers=WITH_OWN_KEY, messages=[{"role": "user", "content": "a-secret-prompt"}])
    guest.chat(http_headers=WITH_OWN_KEY, stream=True)
    secrets = (OWN_KEY, "a-secret-prompt", guest.customer.key)
    for table in ("usage", "entries", "open_holds", "virtual_keys", "audit_trail", "accounts"):
        text = str(house.rows(f"SELECT t::text FROM {table} AS t"))
        assert not [secret for secret in secrets if secret in text], table
    files = [path for path in Path(house.service.data_dir).rglob("*") if path.is_file()]
    for path in [*files, house.service.log_path]:
        data = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in data], path


def test_fee_in_percent_of_the_cost_is_charged_where_the_price_book_has_one(
    make_house: Callable[..., House], provider: FakeProvider
) -> None:
    del provider  # without the scripts of other tests
    house = make_house(
        config='price_book: {default: {kind: markup, factor: "2.0", byok_fee_percent: "5"}}\n'
    )
    guest = house.customer()
    assert guest.chat(http_headers=WITH_OWN_KEY).status_code == 200
    row = guest.usage()
    assert (row["status"], row["price"]) == ("byok", 3000)  # 5% of 60 micro-dollars
    assert guest.balance() == (1_000_000_000 - 3000, 0)
