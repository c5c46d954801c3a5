"""Accounts on a fresh database."""

from collections.abc import Iterator

import pytest

from tests.integration.money import Money, NewAccount


@pytest.fixture
def account(database_url: str) -> Iterator[NewAccount]:
    """Make accounts with a key each, on connections that are closed at the end."""
    made: list[Money] = []

    def make(*, funds: int = 0, **limits: object) -> Money:
        made.append(Money(database_url, funds=funds, **limits))
        return made[-1]

    yield make
    for money in made:
        money.connection.close()
