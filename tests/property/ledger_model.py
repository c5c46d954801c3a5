"""The ledger as a person would keep it: what happened is kept, and every sum is made anew from it.

It has no counters, no running balances, no locks and no snapshots: one thing comes after another.
An account `a` is {credit_limit, version, keys, funding, holds}, and `i` an item of a batch.
"""

from datetime import datetime
from math import inf
from typing import Any

Item = dict[str, Any]
DONE = {"capture": "captured", "void": "voided", "expire": "expired"}
LATE = {"capture": "captured_late", "void": "amended"}
LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrency", "budget_exceeded")


def available(a: Item) -> int:
    gone = sum(h["price"] if h["end"] else h["amount"] for h in a["holds"].values())
    return a["credit_limit"] + sum(amount for _, amount in a["funding"].values()) - gone


def used(a: Item, key_id: str, now: datetime) -> tuple[int, ...]:
    mine = [h for h in a["holds"].values() if h["key_id"] == key_id]
    period = a["keys"][key_id]["period"]
    tokens = [h["tokens"] for h in mine if f"{h['at']:%F %R}" == f"{now:%F %R}"]
    held = [h["amount"] for h in mine if not h["end"]]
    spent = sum(h["price"] for h in mine if f"{h['settled']:{period}}" == f"{now:{period}}")
    return len(tokens), sum(tokens), len(held), spent + sum(held)


def authorize(a: Item, i: Item, now: datetime, *, is_repeat: bool) -> str:
    key, hold = a["keys"].get(i["key_id"]), a["holds"].get(i["request_id"])
    if is_repeat or hold:
        known = "already_settled" if hold and hold["end"] else "exists"
        return "duplicate" if is_repeat else known if hold["amount"] == i["amount"] else "conflict"
    if not key or key["refusal"] or i["version"] != a["version"]:
        return (key["refusal"] or "stale") if key else "unknown_key"
    asked = (1, i["tokens"], 1, i["amount"])
    for limit, so_far, more in zip(LIMITS, used(a, i["key_id"], now), asked, strict=True):
        if more and so_far + more > key.get(limit, inf):
            return limit
    if i["amount"] > max(0, available(a)):
        return "insufficient_credits"
    a["holds"][i["request_id"]] = i | {"at": now, "settled": now, "end": "", "price": 0}
    return "held"


def settle(a: Item, i: Item, now: datetime, grace_s: int) -> tuple[str, int]:
    hold, action = a["holds"].get(i["request_id"]), i["action"]
    if not hold or (action == "expire" and not hold["end"] and hold["ttl_s"] + grace_s > 0):
        return ("not_due" if hold else "unknown"), 0
    was, is_capture = hold["end"], action == "capture"
    if was:
        is_news = (is_capture and i["cost_source"] == "witness") or hold["reason"] == "orphaned"
        if action == "expire" or hold["status"] != "needs_review" or not is_news:
            return "already_" + DONE["capture" if hold["status"] in {"billed", "byok"} else was], 0
    elif is_capture and f"{hold['at']:%F %R}" == f"{now:%F %R}":
        hold["tokens"] = i["input_tokens"] + i["output_tokens"]
    price, freed = i["price"] if is_capture else 0, 0 if was else hold["amount"]
    hold |= {"end": was or action, "late": was and is_capture, "price": price, "settled": now}
    beyond = min(max(0, -available(a)), max(0, price - freed))
    hold |= {"status": i.get("status", "needs_review"), "overdraft": beyond}
    hold["reason"] = i.get("review_reason", "orphaned") or ("overdraft" if beyond else None)
    return (LATE if was else DONE)[action], beyond


def fund(a: Item, kind: str, amount: int, reference: str) -> str:
    if reference in a["funding"]:
        return "exists" if a["funding"][reference] == (kind, amount) else "conflict"
    if amount < 0 and available(a) + amount < 0:
        return "insufficient_credits"
    a["funding"][reference] = (kind, amount)
    return "posted"


def note(hold: Item, *, mismatch: bool) -> None:
    if mismatch and not hold["reason"]:
        hold["reason"] = "witness_mismatch"
