"""A ledger as it is after months: millions of entries that add up to the last nano.

Everything is computed from a request's number, in SQL and in bulk: whose it is, when it came, what
it cost. An account's running sums need no window over its rows, because its prices repeat every
fifty requests. Rows go in by time, as they would have come, so that an account's lie scattered.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import psycopg

ACCOUNTS = 2_000
# Coprime to ACCOUNTS: each turn visits every account once, in another order.
_STRIDE = 7_919
_CHUNK = 400_000
FUNDS = 10**14

# The accounts with their keys, and a deposit each, at the beginning.
_ACCOUNTS = f"""
WITH made AS (
    SELECT
        growth_id('account', n) AS account_id, growth_id('key', n) AS key_id, n,
        growth_request(%(start)s - interval '1 second', n) AS deposit_id
    FROM generate_series(0, {ACCOUNTS - 1}) AS n
),
accounts_made AS (
    INSERT INTO accounts (account_id, name, tier)
    SELECT account_id, 'grown ' || n, 'default' FROM made
),
balances_made AS (
    INSERT INTO balances (account_id, posted, seq) SELECT account_id, {FUNDS}, 1 FROM made
),
keys_made AS (
    INSERT INTO virtual_keys (account_id, key_id, key_hash, prefix, name)
    SELECT account_id, key_id, sha256(key_id::text::bytea), 'sk-', 'key' FROM made
),
counters_made AS (
    INSERT INTO scope_counters (account_id, scope_id)
    SELECT account_id, key_id FROM made UNION ALL SELECT account_id, account_id FROM made
),
funding_made AS (
    INSERT INTO funding SELECT
        account_id, 'growth', 'first', deposit_id, 'deposit', {FUNDS}, NULL, 'growth', %(start)s
    FROM made
)
INSERT INTO entries SELECT
    account_id, deposit_id, 1, 'deposit', 1, {FUNDS}, {FUNDS}, 0, {FUNDS}, 0, NULL, 'first',
    %(start)s
FROM made
"""

_FUNCTIONS = f"""
CREATE FUNCTION growth_id(p_what text, p_number bigint) RETURNS uuid LANGUAGE sql IMMUTABLE
RETURN (
    '019' || substr(md5(p_what), 1, 9) || '7000' || '8' || lpad(to_hex(p_number), 15, '0')
)::uuid;
-- A uuidv7 of that moment.
CREATE FUNCTION growth_request(p_at timestamptz, p_number bigint) RETURNS uuid
LANGUAGE sql IMMUTABLE
RETURN (
    lpad(to_hex((extract(EPOCH FROM p_at) * 1000)::bigint), 12, '0') || '7'
    || lpad(to_hex(p_number % 4096), 3, '0') || '8' || lpad(to_hex(p_number), 15, '0')
)::uuid;
-- Requests by number: the account's, the turn (its how many-th of the account it is), the price.
-- The fiftieth of each fifty is void.
CREATE FUNCTION growth_requests(p_first bigint, p_last bigint, p_start timestamptz, p_step interval)
RETURNS TABLE (
    number bigint, at timestamptz, account_id uuid, key_id uuid, request_id uuid, turn bigint,
    price bigint, spent bigint
) LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT
        n.number, n.at, growth_id('account', n.account), growth_id('key', n.account),
        growth_request(n.at, n.number), n.turn,
        CASE WHEN n.turn % 50 = 49 THEN 0 ELSE (100000 + 7919 * (n.turn % 50)) * n.factor END,
        -- What the requests before it cost: whole fifties, and the beginning of this one.
        (
            (n.turn / 50) * (49 * 100000 + 7919 * (48 * 49 / 2))
            + (n.turn % 50) * 100000
            + 7919 * ((n.turn % 50) * (n.turn % 50 - 1) / 2)
        ) * n.factor
    FROM (
        SELECT
            g AS number, p_start + g * p_step AS at, g / {ACCOUNTS} AS turn,
            (g * {_STRIDE} + g / {ACCOUNTS} * 13) % {ACCOUNTS} AS account,
            1 + ((g * {_STRIDE} + g / {ACCOUNTS} * 13) % {ACCOUNTS}) % 7 AS factor
        FROM generate_series(p_first, p_last) AS g
    ) AS n;
END;
"""

# A hold of one and a half times the price, and what ended it.
_ENTRIES = f"""
INSERT INTO entries
SELECT
    r.account_id, r.request_id, p.phase,
    CASE WHEN p.phase = 0 THEN 'hold' WHEN r.price = 0 THEN 'void' ELSE 'capture' END,
    2 * r.turn + 2 + p.phase,
    CASE WHEN p.phase = 0 OR r.price = 0 THEN r.price * 3 / 2 + 1000 ELSE r.price END,
    CASE WHEN p.phase = 0 THEN 0 ELSE -r.price END,
    CASE WHEN p.phase = 0 THEN 1 ELSE -1 END * (r.price * 3 / 2 + 1000),
    {FUNDS} - r.spent - CASE WHEN p.phase = 0 THEN 0 ELSE r.price END,
    CASE WHEN p.phase = 0 THEN r.price * 3 / 2 + 1000 ELSE 0 END,
    NULL, NULL, r.at
FROM growth_requests(%(first)s, %(last)s, %(start)s, %(step)s) AS r
CROSS JOIN (VALUES (0), (1)) AS p (phase)
"""

# One void of a hundred waits for a review.
_USAGE = """
INSERT INTO usage (
    account_id, request_id, key_id, created_at, settled_at, endpoint, model, model_answered, tier,
    streamed, byok, status, input_tokens, output_tokens, cost_picos, cost_source, price,
    rounding_attos, rule, markup_ppm, price_version, hold, review_reason, upstream_status,
    first_byte_ms, duration_ms, rated_picos, answer_id, attempts, witness_picos
)
SELECT
    r.account_id, r.request_id, r.key_id, r.at, r.at,
    CASE WHEN r.number %% 20 = 0 THEN 'responses' ELSE 'chat.completions' END,
    'model-' || r.number %% 5, 'model-' || r.number %% 5 || '-2026', 'default', r.number %% 3 = 0,
    false,
    CASE
        WHEN r.price > 0 THEN 'billed' WHEN r.turn %% 5000 = 49 THEN 'needs_review' ELSE 'void'
    END,
    200 + r.number * 37 %% 3000, 50 + r.number * 13 %% 900,
    CASE WHEN r.price > 0 THEN r.price * 500 END, CASE WHEN r.price > 0 THEN 'header' END,
    CASE WHEN r.price > 0 THEN r.price END, CASE WHEN r.price > 0 THEN 0 END,
    CASE WHEN r.price > 0 THEN 'default' END, CASE WHEN r.price > 0 THEN 2000000 END, 1,
    r.price * 3 / 2 + 1000,
    CASE WHEN r.price = 0 AND r.turn %% 5000 = 49 THEN 'usage_missing' END,
    200, 300, 900, CASE WHEN r.price > 0 THEN r.price * 500 END,
    CASE WHEN r.number %% 20 = 0 THEN 'resp_' || r.number END, 1,
    CASE WHEN r.price > 0 THEN r.price * 500 END
FROM growth_requests(%(first)s, %(last)s, %(start)s, %(step)s) AS r
"""

_BALANCES = f"""
UPDATE balances AS b SET
    posted = {FUNDS} - r.spent - r.price, seq = 2 * r.turn + 3
FROM growth_requests(%(first)s, %(last)s, %(start)s, %(step)s) AS r
WHERE b.account_id = r.account_id
"""


@dataclass(frozen=True)
class Shape:
    """How much there is to be, and since when."""

    requests: int
    start: datetime
    step: timedelta

    @classmethod
    def of(cls, entries: int, *, days: int) -> "Shape":
        """Spread so many entries, two a request, over the days until now."""
        turns = max(1, entries // (2 * ACCOUNTS))
        requests = turns * ACCOUNTS
        start = datetime.now(UTC) - timedelta(days=days)
        return cls(requests, start, timedelta(days=days) / requests)

    def until(self, at: datetime) -> int:
        """Return how many requests, in whole turns of all accounts, there were by then."""
        return min(self.requests, int((at - self.start) / self.step)) // ACCOUNTS * ACCOUNTS


def prepare(url: str, shape: Shape) -> None:
    """Make the accounts, the price book and the partitions."""
    with psycopg.connect(url) as connection:
        connection.execute("SET search_path = tallygate")
        connection.execute(_FUNCTIONS.encode())
        months = (datetime.now(UTC) - shape.start).days // 28 + 2
        connection.execute("SELECT ensure_partitions(%s, %s)", (shape.start, months))
        connection.execute(
            "SELECT publish_price_book('{}', 1000000, %s, 'growth')",
            ("01900000-0000-7000-8000-000000000000",),
        )
        connection.execute(_ACCOUNTS.encode(), {"start": shape.start})


def load(
    url: str,
    shape: Shape,
    first: int,
    end: int,
    *,
    progress: Callable[[str], None],
    is_analyzed: bool = True,
) -> None:
    """Load requests `first` up to `end`, each whole turns of all accounts."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET search_path = tallygate")
        connection.execute("SET synchronous_commit = off")
        connection.execute("SET work_mem = '256MB'")
        began = time.monotonic()
        for low in range(first, end, _CHUNK):
            last = min(low + _CHUNK, end) - 1
            part = {"first": low, "last": last, "start": shape.start, "step": shape.step}
            connection.execute(_ENTRIES.encode(), part)
            connection.execute(_USAGE.encode(), part)
            progress(f"{last + 1 - first:,} requests loaded, {time.monotonic() - began:.0f} s")
        last_turn = {"first": end - ACCOUNTS, "last": end - 1}
        connection.execute(
            _BALANCES.encode(), {**last_turn, "start": shape.start, "step": shape.step}
        )
        if is_analyzed:
            connection.execute("VACUUM (ANALYZE) balances, open_holds, accounts, virtual_keys")
            connection.execute("ANALYZE entries, usage")


def load_usage(url: str, shape: Shape, *, progress: Callable[[str], None]) -> None:
    """Load the rows of usage of all requests, and nothing of the ledger."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET search_path = tallygate")
        connection.execute("SET synchronous_commit = off")
        for low in range(0, shape.requests, _CHUNK):
            last = min(low + _CHUNK, shape.requests) - 1
            connection.execute(
                _USAGE.encode(),
                {"first": low, "last": last, "start": shape.start, "step": shape.step},
            )
            progress(f"{last + 1:,} rows of usage loaded")
