"""Who takes part, what is asked, and what can be measured by itself."""

(
    DIRECT,
    NGINX,
    STARLETTE,
    BARE,
    UNLEDGERED,
    METERED,
    ACCOUNTS,
    BYOK,
    SPOOL,
    WORKERS,
    PORTKEY,
    LITELLM,
) = (
    "direct",
    "nginx",
    "starlette",
    "bare",
    "unledgered",
    "metered",
    "accounts",
    "byok",
    "spool",
    "workers",
    "portkey",
    "litellm",
)

LABELS = {
    DIRECT: "nginx itself: the upstream, direct",
    NGINX: "nginx as a reverse proxy",
    STARLETTE: "uvicorn and Starlette, answering by themselves",
    BARE: "bare relay: our stack without metering",
    UNLEDGERED: "Tallygate without its ledger",
    METERED: "**Tallygate, metered**",
    ACCOUNTS: "Tallygate, many accounts in turn",
    BYOK: "Tallygate, the customer's own provider key",
    SPOOL: "Tallygate, settling to its spool",
    WORKERS: "Tallygate, two workers",
    PORTKEY: "Portkey's gateway, not metering",
    LITELLM: "LiteLLM's proxy, answering by itself, no database",
}

_TAKES_PART = {
    1: (DIRECT, NGINX, STARLETTE, BARE, UNLEDGERED, METERED, BYOK, PORTKEY, LITELLM),
    32: tuple(LABELS),
}


def takes_part(connections: int) -> tuple[str, ...]:
    """Return who says something with so many connections.

    With one, nothing is spread over workers or accounts; with very many the peers only show once
    more how slow they are.
    """
    some = (DIRECT, NGINX, STARLETTE, BARE, UNLEDGERED, METERED, ACCOUNTS, BYOK, SPOOL, WORKERS)
    few = (BARE, METERED, ACCOUNTS, WORKERS)
    return _TAKES_PART.get(connections, some if connections <= 128 else few)


SMALL, LARGE, HUGE = "0.3 KB", "100 KB", "2 MB"
PROMPT_BYTES = {SMALL: 300, LARGE: 100_000, HUGE: 2_000_000}
BODIES_TAKEN_BY = (DIRECT, BARE, METERED, PORTKEY)

WHOLE, BODIES, STREAMS, FIRST_BYTE, FLOOD, START, LEDGER = GROUPS = (
    "whole",
    "bodies",
    "streams",
    "first-byte",
    "flood",
    "start",
    "ledger",
)
