"""The whole ledger in one snapshot; its results are streamed, so memory does not grow with it."""

from typing import Any, LiteralString

import psycopg
from psycopg import IsolationLevel
from psycopg.rows import tuple_row

from proxy.audit.findings import Finding, stream
from proxy.audit.invariant import Invariant
from proxy.audit.invariants import INVARIANTS
from proxy.audit.prices import PriceCheck

_PRICED_USAGE: LiteralString = """
    SELECT
        account_id, request_id, tier, model, byok, status, input_tokens, cached_input_tokens,
        cache_creation_tokens, cache_creation_1h_tokens, output_tokens, reasoning_tokens,
        audio_input_tokens, audio_output_tokens, image_input_tokens, image_output_tokens, images,
        input_characters, audio_ms, queries, endpoint, quantity,
        cost_picos, price, rounding_attos, rule, markup_ppm, price_version, resolution
    FROM usage WHERE price IS NOT NULL
"""


def audit(url: str) -> list[Finding]:
    """Check every invariant in one snapshot. Raises psycopg's errors where the database is away."""
    with psycopg.connect(url, connect_timeout=10, application_name="tallygate audit") as connection:
        connection.isolation_level = IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        connection.prepare_threshold = None  # a pooler may stand in between
        connection.execute("SET LOCAL search_path = tallygate, pg_temp")
        connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
        connection.execute("SET LOCAL statement_timeout = 0")
        connection.execute("SET LOCAL jit = off")
        findings = [check(connection, invariant) for invariant in INVARIANTS]
        prices = PriceCheck(connection)
        for row in stream(connection, _PRICED_USAGE):
            prices.check(row)
        return [*findings, *prices.findings]


def check(connection: psycopg.Connection[Any], invariant: Invariant) -> Finding:
    """Check one invariant; needs a transaction."""
    with connection.cursor(row_factory=tuple_row) as cursor:
        ((checked,),) = cursor.execute(invariant.checked).fetchall()
    finding = Finding(invariant.name, invariant.promise, checked=checked)
    for broken in stream(connection, invariant.broken):
        finding.report(broken)
    return finding
