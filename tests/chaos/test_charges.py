"""A charge that was answered is in the ledger, and one that was asked for twice is there once."""

import threading
from collections import Counter

import httpx
import psycopg

from proxy.audit import audit
from tests.support.service import Customer, Service, ServiceFactory

CONFIG = 'price_book: {default: {kind: markup, factor: "2.0"}, actions: {message: "1"}}\n'
CUSTOMERS_AT_ONCE = 6
KEYS_EACH = 40


def test_kill_9_among_charges_charges_each_key_once(
    service: ServiceFactory, database_url: str
) -> None:
    running = service(config=CONFIG)
    customer = running.new_key(credits="1000")
    answered = Counter[str]()
    is_under_way = threading.Event()

    def charge(number: int) -> None:
        for key in keys_of(number):
            try:
                made = send(running, customer, key)
            except httpx.TransportError:
                return
            answered[key] = made.status_code
            if len(answered) > CUSTOMERS_AT_ONCE * KEYS_EACH // 4:
                is_under_way.set()

    threads = [threading.Thread(target=charge, args=(n,)) for n in range(CUSTOMERS_AT_ONCE)]
    for thread in threads:
        thread.start()
    assert is_under_way.wait(30)
    running.kill()
    for thread in threads:
        thread.join()
    charged = captured(database_url)
    assert set(answered.values()) == {201}
    # What was under way then, and may or may not be charged, is not among the answers.
    assert len(answered) <= charged <= len(answered) + CUSTOMERS_AT_ONCE
    assert charged < CUSTOMERS_AT_ONCE * KEYS_EACH

    running.start()
    for number in range(CUSTOMERS_AT_ONCE):
        for key in keys_of(number):
            status = send(running, customer, key).status_code
            assert status == 200 if key in answered else status in {200, 201}
    assert captured(database_url) == CUSTOMERS_AT_ONCE * KEYS_EACH
    found = [each.name for each in audit(database_url) if each.violations]
    assert found == []


def keys_of(number: int) -> list[str]:
    return [f"{number}-{order}" for order in range(KEYS_EACH)]


def send(running: Service, customer: Customer, key: str) -> httpx.Response:
    with running.client(customer.key, **{"idempotency-key": key}) as client:
        return client.post("/api/v1/charges", json={"action": "message"})


def captured(url: str) -> int:
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT count(*) FROM tallygate.entries WHERE kind = 'capture'"
        ).fetchone()
    assert row is not None
    return int(row[0])
