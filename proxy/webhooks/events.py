"""What is told, and how it looks: `{"type", "timestamp", "data"}`, money as decimal text."""

from collections.abc import Callable, Mapping
from datetime import UTC
from types import MappingProxyType
from typing import Any

import msgspec

from pricing.money import credits_text, usd_text
from proxy.webhooks.store import Claimed

_Data = Mapping[str, Any]
_Money = Callable[[int], dict[str, str]]


def _balance(data: _Data, money: _Money) -> dict[str, object]:
    posted, held = data["posted"], data["held"]
    return {
        "balance": {
            "posted": money(posted),
            "held": money(held),
            "available": money(posted - held + data["credit_limit"]),
        }
    }


def _low_balance(data: _Data, money: _Money) -> dict[str, object]:
    return {**_balance(data, money), "threshold": money(data["threshold"])}


def _over_budget(data: _Data, money: _Money) -> dict[str, object]:
    return {
        "key_id": data["key_id"],
        "budget": {**money(data["budget"]), "period": data["period"]},
        "spent": money(data["spent"]),
    }


def _review(data: _Data, money: _Money) -> dict[str, object]:
    price = data["price"]
    return {**data, "price": None if price is None else money(price)}


def _as_it_is(data: _Data, _money: _Money) -> dict[str, object]:
    return dict(data)


_SHAPES: Mapping[str, Callable[[_Data, _Money], dict[str, object]]] = MappingProxyType(
    {
        "balance.low": _low_balance,
        "balance.exhausted": _balance,
        "key.over_budget": _over_budget,
        "review.opened": _review,
        "audit.failed": _as_it_is,
        "webhook.test": _as_it_is,
    }
)
# What a receiver may ask for. A test comes to the receiver that it was made for, whatever it takes.
EVENT_TYPES = tuple(name for name in _SHAPES if name != "webhook.test")


def body_of(event: Claimed, nanos_per_credit: int) -> bytes:
    """Render an event; the same bytes at each attempt. `account_id` is null where it is of none."""

    def money(nanos: int) -> dict[str, str]:
        return {"credits": credits_text(nanos, nanos_per_credit), "usd": usd_text(nanos)}

    return msgspec.json.encode(
        {
            "type": event.type,
            "timestamp": event.at.astimezone(UTC),
            "data": {
                "account_id": event.account_id if event.account_id.int else None,
                **_SHAPES.get(event.type, _as_it_is)(event.data, money),
            },
        }
    )
