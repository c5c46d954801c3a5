"""What an operator does to accounts and keys from a shell, straight on the database.

Every function returns what is to be shown, as a JSON-able document in the words of the admin API.
"""

import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal
from uuid import UUID

from pricing.money import credits_text, nanos_from_credits, usd_text, usd_text_from_picos
from proxy.accounts import Accounts
from proxy.api.admin_reviews import decision_of, refusal
from proxy.db import make_pool, require_schema
from proxy.directory import AccountFilter, Directory
from proxy.errors import InvalidRequestError
from proxy.ids import uuid7
from proxy.keys import Keys, KeySettings, NewKey
from proxy.ledger import Balance, Ledger
from proxy.price_books import PriceBooks
from proxy.reports import Reports, ReviewFilter
from proxy.reviews import Reviews
from proxy.serving import freeze_credit
from proxy.tiers import Tiers

ACTOR = "cli"
# The same as the admin API's, so that a reference counts once, whichever way it comes.
GRANT_SOURCE = "admin"
_PAGE = 500
_NOT_ROTATED = {
    "revoked": "is revoked: create a new one",
    "expired": "has expired: create a new one",
    "replaced": "has another in its place already: rotate that one",
    "closed": "is of a closed account",
}

Document = dict[str, Any]


class NotDoneError(Exception):
    """What was asked for does not exist or is refused; the text says why."""


@dataclass(frozen=True, slots=True)
class Administration:
    """The stores, over one pool, and what a credit is worth."""

    accounts: Accounts
    keys: Keys
    directory: Directory
    ledger: Ledger
    reports: Reports
    reviews: Reviews
    price_books: PriceBooks
    nanos_per_credit: int
    tiers: Tiers

    async def create_account(self, name: str, *, tier: str, credits_: str | None) -> Document:
        """Make an account, with a first grant if `credits_` are given."""
        # A wrong amount must be known before there is an account.
        amount = self._nanos(credits_) if credits_ is not None else 0
        try:
            self.tiers.check(tier)
        except InvalidRequestError as error:
            raise NotDoneError(error.message) from None
        account_id = await self.accounts.create_account(
            name=name,
            tier=tier,
            credit_limit_nanos=0,
            actor=ACTOR,
            starter_nanos=self.tiers.of(tier, {}).starter_nanos,
            monthly_nanos=self.tiers.monthly_nanos,
        )
        if amount:
            await self._fund(account_id, amount, reason="first credits", reference="first")
        return self._account(await self._row(account_id))

    async def list_accounts(self) -> Document:
        """List every account, newest first."""

        async def page(*, before: UUID | None, limit: int) -> list[Document]:
            return (await self.directory.search(AccountFilter(), before=before, limit=limit)).rows

        rows = await _every(page, "account_id")
        return {"data": [self._account(row) for row in rows]}

    async def grant(
        self, account_id: UUID, credits_: str, *, reason: str, reference: str | None
    ) -> Document:
        """Grant credits, once for each reference."""
        return await self._fund(
            account_id, self._nanos(credits_), reason=reason, reference=reference or str(uuid7())
        )

    async def create_key(
        self, account_id: UUID, name: str, settings: KeySettings, *, budget_credits: str | None
    ) -> Document:
        """Make a key; the document is the only place where it stands."""
        if budget_credits is not None:
            settings = replace(settings, budget=self._nanos(budget_credits))
        made = await self.keys.create(account_id, name=name, settings=settings, actor=ACTOR)
        if made is None:
            text = f"there is no account {account_id}, or it is closed"
            if settings.project_id is not None:
                text += f", or it has no active project {settings.project_id}"
            raise NotDoneError(text)
        return _new_key(account_id, name, made)

    async def list_keys(self, account_id: UUID) -> Document:
        """List every key of an account, newest first, without the secrets."""
        await self._row(account_id)
        return {"data": [self._key(row) for row in await self._keys(account_id)]}

    async def revoke_key(self, account_id: UUID, key_id: UUID) -> Document:
        """Revoke a key, at once and on every replica."""
        if not await self.keys.revoke(account_id, key_id, actor=ACTOR):
            raise NotDoneError(f"account {account_id} has no key {key_id}")
        return {"id": key_id, "status": "revoked"}

    async def rotate_key(self, account_id: UUID, key_id: UUID, *, overlap_s: int) -> Document:
        """Put a new key in a key's place, which ends after so many seconds, or at once for 0."""
        old = await self.keys.key(account_id, key_id)
        rotated = await self.keys.rotate(account_id, key_id, overlap_s=overlap_s, actor=ACTOR)
        if old is None:
            raise NotDoneError(f"account {account_id} has no key {key_id}")
        if rotated.key is None:
            raise NotDoneError(f"key {key_id} {_NOT_ROTATED[rotated.outcome]}")
        return {**_new_key(account_id, old["name"], rotated.key), "replaces": key_id}

    async def list_reviews(self, wanted: ReviewFilter, *, limit: int) -> Document:
        """List what waits for a decision, newest first."""
        rows = await self.reports.reviews(wanted, before=None, limit=limit)
        return {"data": [self._review(row) for row in rows]}

    async def review_counts(self) -> Document:
        """Count what waits for a decision, by reason."""
        rows = await self.reports.review_counts()
        return {
            "data": [
                {
                    "reason": row["review_reason"],
                    "charged": row["is_charged"],
                    "requests": row["requests"],
                    "oldest_at": row["oldest_at"],
                    "held_credits": credits_text(row["held"], self.nanos_per_credit),
                }
                for row in rows
            ]
        }

    async def resolve_review(
        self,
        account_id: UUID,
        request_id: UUID,
        kind: Literal["charge", "waive", "reprice"],
        *,
        credits_: str | None,
        cost_usd: str | None,
        reason: str,
    ) -> Document:
        """Decide on a request, once; what was decided before in the same way is shown again."""
        try:
            decision = decision_of(kind, credits_, cost_usd, self.nanos_per_credit)
            resolved = await self.reviews.resolve(
                account_id, request_id, decision, actor=ACTOR, reason=reason
            )
        except InvalidRequestError as error:
            raise NotDoneError(error.message) from None
        if resolved.row is None:
            raise NotDoneError(f"account {account_id} has no request {request_id} that has ended")
        if not resolved.is_done:
            raise NotDoneError(refusal(resolved))
        return {"outcome": resolved.outcome, **self._review(resolved.row)}

    async def _fund(
        self, account_id: UUID, amount_nanos: int, *, reason: str, reference: str
    ) -> Document:
        if amount_nanos <= 0:
            raise NotDoneError("a grant must be more than 0 credits")
        done = await self.ledger.fund(
            account_id,
            uuid7(),
            kind="grant",
            amount_nanos=amount_nanos,
            source=GRANT_SOURCE,
            external_id=reference,
            reason=reason,
            actor=ACTOR,
        )
        if done.balance is None:
            raise NotDoneError(f"there is no account {account_id}")
        if done.outcome == "conflict":
            raise NotDoneError(f"reference {reference!r} was used for another amount")
        return {
            "entry_id": done.entry_id,
            "outcome": done.outcome,
            "reference": reference,
            "balance": self._balance(done.balance),
        }

    async def _row(self, account_id: UUID) -> Mapping[str, Any]:
        row = await self.accounts.account(account_id)
        if row is None:
            raise NotDoneError(f"there is no account {account_id}")
        return row

    async def _keys(self, account_id: UUID) -> list[Document]:
        async def page(*, before: UUID | None, limit: int) -> list[Document]:
            return await self.keys.keys(account_id, before=before, limit=limit)

        return await _every(page, "key_id")

    def _account(self, row: Mapping[str, Any]) -> Document:
        return {
            "id": row["account_id"],
            "name": row["name"],
            "tier": row["tier"],
            "status": row["status"],
            "created_at": row["created_at"],
            "balance": self._balance(Balance(row["posted"], row["reserved"], row["credit_limit"])),
        }

    def _balance(self, balance: Balance) -> Document:
        return {
            "posted": self._amount(balance.posted),
            "held": self._amount(balance.held),
            "available": self._amount(balance.available),
        }

    def _amount(self, nanos: int) -> Document:
        return {"credits": credits_text(nanos, self.nanos_per_credit), "usd": usd_text(nanos)}

    def _key(self, row: Mapping[str, Any]) -> Document:
        budgets = {
            f"{name}_credits": None
            if row[name] is None
            else credits_text(row[name], self.nanos_per_credit)
            for name in ("budget", "budget_left")
        }
        others = row.keys() - {"account_id", "key_id", "budget", "budget_left"}
        return {
            "id": row["key_id"],
            **{name: value for name, value in row.items() if name in others},
            **budgets,
        }

    def _review(self, row: Mapping[str, Any]) -> Document:
        price = row["price"]
        costs = {
            name: None if row[column] is None else usd_text_from_picos(row[column])
            for name, column in (
                ("cost_usd", "cost_picos"),
                ("rated_cost_usd", "rated_picos"),
                ("witness_cost_usd", "witness_picos"),
            )
        }
        return {
            "request_id": row["request_id"],
            "account_id": row["account_id"],
            "created_at": row["created_at"],
            "endpoint": row["endpoint"],
            "model": row["model"],
            "status": row["status"],
            "reason": row["review_reason"],
            "price_credits": None if price is None else credits_text(price, self.nanos_per_credit),
            **costs,
            "resolution": row["resolution"],
        }

    def _nanos(self, credits_: str) -> int:
        return nanos_from_credits(credits_, self.nanos_per_credit)


def _new_key(account_id: UUID, name: str, made: NewKey) -> Document:
    return {"id": made.key_id, "account_id": account_id, "name": name, "key": made.secret}


async def _every(
    page: Callable[..., Coroutine[Any, Any, list[Document]]], name: str
) -> list[Document]:
    """Read all pages of a list; `name` is the column that it is ordered by."""
    rows: list[Document] = []
    while True:
        more = await page(before=rows[-1][name] if rows else None, limit=_PAGE)
        rows += more
        if len(more) < _PAGE:
            return rows


@contextlib.asynccontextmanager
async def administration(
    url: str, nanos_per_credit: int, tiers: Tiers
) -> AsyncGenerator[Administration]:
    """Open the stores; ConfigurationError where the database is not what the settings say."""
    require_schema(url)
    async with make_pool(url, max_size=2) as pool:
        books = PriceBooks(pool)
        await freeze_credit(books, nanos_per_credit)
        ledger, reports = Ledger(url, pool), Reports(pool)
        reviews = Reviews(pool, reports)
        try:
            yield Administration(
                Accounts(pool),
                Keys(pool),
                Directory(pool),
                ledger,
                reports,
                reviews,
                books,
                nanos_per_credit,
                tiers,
            )
        finally:
            await ledger.close()
