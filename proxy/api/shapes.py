"""How rows look from outside: money as credits and dollars, times in UTC, columns by their names.

Two views of a request exist, and only the operator's has what the provider took.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, cast, overload
from uuid import UUID

from pricing.money import credits_text, decimal_text, usd_text, usd_text_from_picos
from proxy.api import answers
from proxy.expiring_credits import Expiring
from proxy.ledger import Balance

Row = Mapping[str, Any]

_REQUEST_KINDS = frozenset({"hold", "capture", "void", "expire", "late_capture", "correction"})
_NO_ACCOUNT = UUID(int=0)


class Shapes:
    """Renders rows; knows what a credit is worth."""

    def __init__(self, nanos_per_credit: int) -> None:
        self._nanos_per_credit = nanos_per_credit

    def money(self, nanos: int) -> answers.Money:
        """Render an amount as decimal strings, exactly."""
        return {"credits": credits_text(nanos, self._nanos_per_credit), "usd": usd_text(nanos)}

    def balance(self, balance: Balance) -> answers.Balance:
        """Render a balance."""
        return {
            "posted": self.money(balance.posted),
            "held": self.money(balance.held),
            "available": self.money(balance.available),
        }

    def expiring(self, part: Expiring) -> answers.ExpiringCredits:
        """Render the part of a balance that is gone at a time."""
        return {**self.money(part.nanos), "expires_at": utc(part.expires_at)}

    def account(self, row: Row) -> answers.Account:
        """Render an account with its balance."""
        balance = Balance(row["posted"], row["reserved"], row["credit_limit"])
        return {
            "id": row["account_id"],
            "name": row["name"],
            "tier": row["tier"],
            "status": row["status"],
            "replay_retries": row["replay_retries"],
            "created_at": utc(row["created_at"]),
            "balance": self.balance(balance),
            "credit_limit": self.money(balance.credit_limit),
        }

    def account_detail(self, row: Row, detail: Row) -> answers.AccountDetail:
        """Render an account with what `Directory.detail` says of it."""
        return {
            **self.account(row),
            "status_reason": detail["status_reason"],
            "overrides": detail["overrides"],
            "active_keys": detail["active_keys"],
            "all_keys": detail["all_keys"],
            "last_request_at": utc(detail["last_request_at"]),
        }

    def key(self, row: Row) -> answers.Key:
        """Render a virtual key; of the secret there is only its prefix."""
        return {
            "id": row["key_id"],
            "name": row["name"],
            "prefix": row["prefix"],
            "status": row["status"],
            "role": row["role"],
            "project_id": row["project_id"],
            "created_at": utc(row["created_at"]),
            "last_used_at": utc(row["last_used_at"]),
            "expires_at": utc(row["expires_at"]),
            "revoked_at": utc(row["revoked_at"]),
            "replaced_by": row["replaced_by"],
            "allowed_models": row["allowed_models"],
            "allowed_endpoints": row["allowed_endpoints"],
            "allowed_networks": row["allowed_networks"],
            "requests_per_minute": row["requests_per_minute"],
            "tokens_per_minute": row["tokens_per_minute"],
            "max_concurrency": row["max_concurrency"],
            "budget": self._budget(row),
            "budget_left": self._budget_left(row),
        }

    def account_key(self, row: Row) -> answers.AccountKey:
        """Render a virtual key with whose it is."""
        return {**self.key(row), "account_id": row["account_id"]}

    def project(self, row: Row) -> answers.Project:
        """Render a project."""
        return {
            "id": row["project_id"],
            "name": row["name"],
            "status": row["status"],
            "created_at": utc(row["created_at"]),
            "archived_at": utc(row["archived_at"]),
            "budget": self._budget(row),
            "budget_left": self._budget_left(row),
        }

    def _budget(self, row: Row) -> answers.KeyBudget | None:
        budget = row["budget"]
        return None if budget is None else {**self.money(budget), "period": row["budget_period"]}

    def _budget_left(self, row: Row) -> answers.Money | None:
        left = row["budget_left"]
        return None if left is None else self.money(left)

    def usage(self, row: Row) -> answers.Usage:
        """Render a request as its customer sees it; unknown counts of tokens are null."""
        price = row["price"]
        return {
            "request_id": row["request_id"],
            "key_id": row["key_id"],
            "project_id": row["project_id"],
            "created_at": utc(row["created_at"]),
            "endpoint": row["endpoint"],
            "model": row["model"],
            "status": row["status"],
            "usage": counts_of(row),
            "quantity": row["quantity"],
            "price": None if price is None else self.money(price),
        }

    def admin_usage(self, row: Row) -> answers.AdminUsage:
        """Render a request as the operator sees it, with both sides of its money."""
        markup = row["markup_ppm"]
        return {
            **self.usage(row),
            "account_id": row["account_id"],
            "tier": row["tier"],
            "streamed": row["streamed"],
            "byok": row["byok"],
            "model_answered": row["model_answered"],
            "settled_at": utc(row["settled_at"]),
            "cost": cost(row["cost_picos"]),
            "cost_source": row["cost_source"],
            "rated_cost": cost(row["rated_picos"]),
            "witness_cost": cost(row["witness_picos"]),
            "attempts": row["attempts"],
            "answer_id": row["answer_id"],
            "service_tier": row["service_tier"],
            "markup": None if markup is None else decimal_text(markup, 6),
            "rule": row["rule"],
            "price_version": row["price_version"],
            "hold": self.money(row["hold"]),
            "overdraft": self.money(row["overdraft"]),
            "review_reason": row["review_reason"],
            "resolution": row["resolution"],
            "resolved_at": utc(row["resolved_at"]),
            "error_code": row["error_code"],
            "upstream_status": row["upstream_status"],
            "client_gone": row["client_gone"],
            "first_byte_ms": row["first_byte_ms"],
            "duration_ms": row["duration_ms"],
        }

    def entry(self, row: Row) -> answers.Entry:
        """Render a ledger entry as its customer sees it.

        Entries of a request have its id; others have an id of their own, which is that of the
        grant or deposit.
        """
        is_request = row["kind"] in _REQUEST_KINDS
        return {
            "seq": row["seq"],
            "created_at": utc(row["at"]),
            "kind": row["kind"],
            "request_id": row["request_id"] if is_request else None,
            "entry_id": None if is_request else row["request_id"],
            "amount": self.money(row["amount"]),
            "posted_change": self.money(row["posted_delta"]),
            "held_change": self.money(row["reserved_delta"]),
            "posted_after": self.money(row["posted_after"]),
            "held_after": self.money(row["reserved_after"]),
            "reference": row["reference"],
        }

    def admin_entry(self, row: Row) -> answers.AdminEntry:
        """Render a ledger entry as the operator sees it: the reason is a note to themselves."""
        return {**self.entry(row), "reason": row["reason"]}

    def price_book(self, row: Row) -> answers.PriceBook:
        """Render a version of the price book."""
        return {
            "version": row["version"],
            "state": row["state"],
            "valid_from": utc(row["valid_from"]),
            "published_by": row["published_by"],
            "credit_usd": usd_text(row["nanos_per_credit"]),
            "document": row["document"],
        }


def counts_of(row: Row) -> answers.Counts:
    """Render what was used, by the names of the columns."""
    counts = {name: row[name] for name in answers.Counts.__annotations__}
    return cast("answers.Counts", counts)


@overload
def cost(picos: int) -> answers.Cost: ...
@overload
def cost(picos: None) -> None: ...
def cost(picos: int | None) -> answers.Cost | None:
    """Render what a provider takes, or what is left of a price without it."""
    return None if picos is None else {"usd": usd_text_from_picos(picos), "picos": str(picos)}


def audit_event(row: Row) -> answers.AuditEvent:
    """Render an act of an operator; amounts in its detail are integers of nano-USD."""
    account_id = row["account_id"]
    return {
        "id": row["event_id"],
        "created_at": utc(row["at"]),
        "actor": row["actor"],
        "action": row["action"],
        "account_id": None if account_id == _NO_ACCOUNT else account_id,
        "detail": row["detail"],
    }


@overload
def utc(moment: datetime) -> datetime: ...
@overload
def utc(moment: None) -> None: ...
def utc(moment: datetime | None) -> datetime | None:
    """Bring a time to UTC: PostgreSQL answers in the time zone of its connection."""
    return None if moment is None else moment.astimezone(UTC)
