"""Accounts of the run, made over SQL, so that no replica need be up for it."""

from hashlib import sha256

import msgspec
import psycopg

from proxy.ids import uuid7


class Account:
    """An account with a key, and what was paid into it."""

    def __init__(self, database_url: str, name: str, *, credit_limit: int = 0) -> None:
        self._url = database_url
        self.name = name
        self.account_id = uuid7()
        self.credit_limit = credit_limit
        self.key = f"sk-{name}-{self.account_id.hex}"
        self.funded = 0
        self.key_id = uuid7()
        key = {"key_id": str(self.key_id), "name": name, "prefix": "sk-"}
        with psycopg.connect(database_url) as connection:
            connection.execute("SET search_path = tallygate")
            connection.execute(
                "SELECT create_account(%s, %s, 'default', %s, 'chaos')",
                (self.account_id, name, credit_limit),
            )
            connection.execute(
                "SELECT create_key(%s, %s, %s, 'chaos')",
                (
                    self.account_id,
                    sha256(self.key.encode()).digest(),
                    msgspec.json.encode(key).decode(),
                ),
            )

    def fund(self, amount: int) -> None:
        """Give it money, once for each call."""
        with psycopg.connect(self._url) as connection:
            connection.execute("SET search_path = tallygate")
            connection.execute(
                "SELECT fund(%s, %s, 'grant', %s, 'chaos', %s, 'chaos', 'chaos')",
                (self.account_id, uuid7(), amount, f"grant-{self.funded}"),
            )
        self.funded += amount
