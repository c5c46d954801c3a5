"""What usage adds up to: of an account by what it was for, and of the whole house by the day.

Both read what `usage_rollups` says of the hours that are rolled up, and the rows themselves of what
came since, of marked hours and of parts of an hour, each in one statement: see schema.sql for why
that is exact. In detached months hours count as a whole, because of them there is nothing else.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import dict_row

from proxy.db import Pool
from proxy.history import UsageFilter

Row = dict[str, Any]

# What a summary can be grouped by.
GROUPS = ("model", "day", "hour", "key", "project", "tier", "endpoint")
# More than anybody reads; a query with more groups than this is refused by whoever asked for it.
MAX_GROUPS = 10_000

_HOUR = timedelta(hours=1)

_SUMMARY: LiteralString = """
WITH state AS (SELECT frozen_until, rolled_until FROM usage_rollup_state),
whole AS (
    -- The hours of the period that are rolled up, unless they are marked.
    SELECT
        s.frozen_until,
        CASE
            WHEN %(since)s < s.frozen_until THEN date_trunc('hour', %(since)s::timestamptz, 'UTC')
            ELSE %(since_up)s::timestamptz
        END AS first,
        least(s.rolled_until, CASE
            WHEN %(until)s <= s.frozen_until THEN %(until_up)s::timestamptz
            ELSE date_trunc('hour', %(until)s::timestamptz, 'UTC')
        END) AS last
    FROM state AS s
),
marked AS MATERIALIZED (
    SELECT DISTINCT m.hour FROM usage_dirty AS m, whole AS w
    WHERE m.account_id = %(account_id)s
        AND m.hour >= greatest(w.first, w.frozen_until) AND m.hour < w.last
),
stretches AS (
    SELECT %(since)s::timestamptz AS low, w.first AS high FROM whole AS w WHERE w.first < w.last
    UNION ALL
    SELECT CASE WHEN w.first < w.last THEN w.last ELSE %(since)s END, %(until)s::timestamptz
    FROM whole AS w
    UNION ALL
    SELECT m.hour, m.hour + interval '1 hour' FROM marked AS m
),
parts AS (
    SELECT
        r.hour, r.key_id, r.project_id, r.model, r.tier, r.endpoint, r.status, r.error_code,
        r.requests, r.input_tokens, r.cached_input_tokens, r.cache_creation_tokens,
        r.cache_creation_1h_tokens, r.output_tokens, r.reasoning_tokens, r.audio_input_tokens,
        r.audio_output_tokens, r.image_input_tokens, r.image_output_tokens, r.images,
        r.input_characters, r.audio_ms, r.queries, r.price, r.cost_picos
    FROM whole AS w INNER JOIN usage_rollups AS r ON r.hour >= w.first AND r.hour < w.last
    WHERE r.account_id = %(account_id)s AND r.hour NOT IN (SELECT m.hour FROM marked AS m)
    UNION ALL
    SELECT
        usage_hour(u.request_id), u.key_id, u.project_id, u.model, u.tier, u.endpoint, u.status,
        u.error_code, 1, u.input_tokens, u.cached_input_tokens, u.cache_creation_tokens,
        u.cache_creation_1h_tokens, u.output_tokens, u.reasoning_tokens, u.audio_input_tokens,
        u.audio_output_tokens, u.image_input_tokens, u.image_output_tokens, u.images,
        u.input_characters, u.audio_ms, u.queries, u.price,
        CASE WHEN NOT u.byok THEN u.cost_picos END
    FROM stretches AS s
    CROSS JOIN LATERAL (
        SELECT v.* FROM usage AS v
        WHERE v.account_id = %(account_id)s
            AND v.request_id >= uuid_floor(s.low) AND v.request_id < uuid_floor(s.high)
        -- Kept a query of its own: each stretch is one descent of an index.
        OFFSET 0
    ) AS u
)
SELECT
    CASE WHEN %(by_model)s THEN p.model END AS model,
    CASE WHEN %(by_day)s THEN (p.hour AT TIME ZONE 'UTC')::date END AS day,
    CASE WHEN %(by_hour)s THEN p.hour END AS hour,
    CASE WHEN %(by_key)s THEN p.key_id END AS key_id,
    CASE WHEN %(by_project)s THEN p.project_id END AS project_id,
    CASE WHEN %(by_tier)s THEN p.tier END AS tier,
    CASE WHEN %(by_endpoint)s THEN p.endpoint END AS endpoint,
    sum(p.requests) AS requests,
    coalesce(sum(p.requests) FILTER (WHERE p.error_code IS NOT NULL), 0) AS failed,
    sum(p.input_tokens) AS input_tokens,
    sum(p.cached_input_tokens) AS cached_input_tokens,
    sum(p.cache_creation_tokens) AS cache_creation_tokens,
    sum(p.cache_creation_1h_tokens) AS cache_creation_1h_tokens,
    sum(p.output_tokens) AS output_tokens,
    sum(p.reasoning_tokens) AS reasoning_tokens,
    sum(p.audio_input_tokens) AS audio_input_tokens,
    sum(p.audio_output_tokens) AS audio_output_tokens,
    sum(p.image_input_tokens) AS image_input_tokens,
    sum(p.image_output_tokens) AS image_output_tokens,
    sum(p.images) AS images,
    sum(p.input_characters) AS input_characters,
    sum(p.audio_ms) AS audio_ms,
    sum(p.queries) AS queries,
    coalesce(sum(p.price), 0) AS price,
    coalesce(sum(p.cost_picos), 0) AS cost_picos
FROM parts AS p
WHERE (%(model)s::text IS NULL OR p.model = %(model)s)
    AND (%(key_id)s::uuid IS NULL OR p.key_id = %(key_id)s)
    AND (%(project_id)s::uuid IS NULL OR p.project_id = %(project_id)s)
    AND (%(status)s::text IS NULL OR p.status = %(status)s)
    AND (%(endpoint)s::text IS NULL OR p.endpoint = %(endpoint)s)
GROUP BY 1, 2, 3, 4, 5, 6, 7
ORDER BY 2 DESC, 3 DESC, price DESC, requests DESC, 1, 4, 5, 6, 7
LIMIT %(limit)s
"""

# What came after the last whole hour is read by account, because usage has no other order.
_STATS: LiteralString = """
WITH state AS (SELECT frozen_until, rolled_until FROM usage_rollup_state),
period AS (
    SELECT
        %(first_day)s::date AS first_day, %(last_day)s::date AS last_day,
        greatest(s.rolled_until, %(first_day)s::date::timestamp AT TIME ZONE 'UTC') AS low,
        (%(last_day)s::date + 1)::timestamp AT TIME ZONE 'UTC' AS high, s.frozen_until,
        s.rolled_until
    FROM state AS s
),
-- Looked up once, so that the months to be read are found once and not for each account.
ids AS MATERIALIZED (SELECT uuid_floor(p.low) AS low, uuid_floor(p.high) AS high FROM period AS p),
marked AS MATERIALIZED (
    SELECT DISTINCT m.account_id, m.hour FROM usage_dirty AS m, period AS p
    WHERE m.hour >= greatest(p.first_day::timestamp AT TIME ZONE 'UTC', p.frozen_until)
        AND m.hour < least(p.high, p.rolled_until)
),
parts (
    day, tier, model, endpoint, status, error_code, requests, input_tokens, output_tokens, price,
    cost_picos
) AS (
    SELECT
        d.day, d.tier, d.model, d.endpoint, d.status, d.error_code, d.requests, d.input_tokens,
        d.output_tokens, d.price, d.cost_picos
    FROM usage_days AS d, period AS p WHERE d.day >= p.first_day AND d.day <= p.last_day
    UNION ALL
    SELECT r.* FROM balances AS b CROSS JOIN LATERAL (
        SELECT (usage_hour(u.request_id) AT TIME ZONE 'UTC')::date,
            u.tier, u.model, u.endpoint, u.status, coalesce(u.error_code, ''),
            count(*) AS requests, sum(u.input_tokens) AS input_tokens,
            sum(u.output_tokens) AS output_tokens, sum(u.price) AS price,
            sum(u.cost_picos) FILTER (WHERE NOT u.byok) AS cost_picos
        FROM usage AS u
        WHERE u.account_id = b.account_id
            AND u.request_id >= (SELECT i.low FROM ids AS i)
            AND u.request_id < (SELECT i.high FROM ids AS i)
        GROUP BY 1, 2, 3, 4, 5, 6
    ) AS r
    UNION ALL
    SELECT r.* FROM marked AS m CROSS JOIN LATERAL (
        SELECT (m.hour AT TIME ZONE 'UTC')::date,
            u.tier, u.model, u.endpoint, u.status, coalesce(u.error_code, ''),
            count(*) AS requests, sum(u.input_tokens) AS input_tokens,
            sum(u.output_tokens) AS output_tokens, sum(u.price) AS price,
            sum(u.cost_picos) FILTER (WHERE NOT u.byok) AS cost_picos
        FROM usage AS u
        WHERE u.account_id = m.account_id AND u.request_id >= uuid_floor(m.hour)
            AND u.request_id < uuid_floor(m.hour + interval '1 hour')
        GROUP BY 1, 2, 3, 4, 5, 6
    ) AS r
    UNION ALL
    SELECT
        (u.hour AT TIME ZONE 'UTC')::date, u.tier, u.model, u.endpoint, u.status,
        coalesce(u.error_code, ''), -u.requests, -u.input_tokens, -u.output_tokens, -u.price,
        -u.cost_picos
    FROM marked AS m
    INNER JOIN usage_rollups AS u ON m.account_id = u.account_id AND m.hour = u.hour
)
SELECT
    grouping(t.day, t.model, t.tier, t.endpoint) AS level,
    t.day, t.model, t.tier, t.endpoint, t.error_code, sum(t.requests) AS requests,
    coalesce(sum(t.requests) FILTER (WHERE t.error_code <> ''), 0) AS failed,
    coalesce(sum(t.input_tokens), 0) AS input_tokens,
    coalesce(sum(t.output_tokens), 0) AS output_tokens,
    coalesce(sum(t.price), 0) AS price, coalesce(sum(t.cost_picos), 0) AS cost_picos
FROM parts AS t
GROUP BY GROUPING SETS ((), (t.day), (t.model), (t.tier), (t.endpoint, t.error_code))
HAVING sum(t.requests) > 0
ORDER BY level, t.day DESC, price DESC, requests DESC, t.model, t.tier, t.endpoint, t.error_code
"""
_ACTIVE: LiteralString = """
WITH state AS (SELECT frozen_until, rolled_until FROM usage_rollup_state),
period AS (
    SELECT
        %(first_day)s::date AS first_day, %(last_day)s::date AS last_day,
        greatest(s.rolled_until, %(first_day)s::date::timestamp AT TIME ZONE 'UTC') AS low,
        (%(last_day)s::date + 1)::timestamp AT TIME ZONE 'UTC' AS high, s.frozen_until,
        s.rolled_until
    FROM state AS s
),
-- Looked up once, so that the months to be read are found once and not for each account.
ids AS MATERIALIZED (SELECT uuid_floor(p.low) AS low, uuid_floor(p.high) AS high FROM period AS p),
marked AS MATERIALIZED (
    SELECT DISTINCT m.account_id, m.hour FROM usage_dirty AS m, period AS p
    WHERE m.hour >= greatest(p.first_day::timestamp AT TIME ZONE 'UTC', p.frozen_until)
        AND m.hour < least(p.high, p.rolled_until)
),
active AS (
    SELECT DISTINCT a.account_id FROM usage_active_days AS a, period AS p
    WHERE a.day >= p.first_day AND a.day <= p.last_day
    UNION
    SELECT b.account_id FROM balances AS b CROSS JOIN LATERAL (
        SELECT 1 FROM usage AS u
        WHERE u.account_id = b.account_id
            AND u.request_id >= (SELECT i.low FROM ids AS i)
            AND u.request_id < (SELECT i.high FROM ids AS i)
        LIMIT 1
    ) AS r
    UNION
    SELECT m.account_id FROM marked AS m CROSS JOIN LATERAL (
        SELECT 1 FROM usage AS u
        WHERE u.account_id = m.account_id AND u.request_id >= uuid_floor(m.hour)
            AND u.request_id < uuid_floor(m.hour + interval '1 hour')
        LIMIT 1
    ) AS r
)
SELECT
    a.tier, count(*) AS accounts, count(*) FILTER (WHERE a.status = 'active') AS open,
    count(c.account_id) AS active
FROM accounts AS a LEFT JOIN active AS c ON a.account_id = c.account_id
GROUP BY a.tier ORDER BY 2 DESC, 1
"""
# The bits of `level`: a group's column is 0 where it is grouped by it.
_BY_DAY, _BY_MODEL, _BY_TIER, _BY_ERROR, _ALL = 0b0111, 0b1011, 0b1101, 0b1110, 0b1111


@dataclass(frozen=True, slots=True)
class Stats:
    """What all accounts used in some days; rows have sums of usage, in nano-USD and picos."""

    total: Row
    by_day: list[Row]
    by_model: list[Row]
    by_tier: list[Row]
    # By endpoint and error code, those without an error left out.
    failed: list[Row]
    # By tier: accounts there are, not suspended or closed, and with requests in these days.
    accounts: list[Row]


class Summaries:
    """Reads, over the pool. Raises psycopg's errors where the database is away."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def summary(
        self, account_id: UUID, wanted: UsageFilter, by: Collection[str] = ()
    ) -> list[Row]:
        """Add an account's requests up, by some of GROUPS; one more than MAX_GROUPS rows at most.

        Pending requests have no usage yet. Without groups there is one row, or none.
        """
        begin, end = wanted.begin, max(wanted.end, wanted.begin)
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=dict_row) as cursor,
        ):
            await cursor.execute(
                _SUMMARY,
                {
                    "account_id": account_id,
                    "since": begin,
                    "since_up": _hour_up(begin),
                    "until": end,
                    "until_up": _hour_up(end),
                    **wanted.matches,
                    **{f"by_{name}": name in by for name in GROUPS},
                    "limit": MAX_GROUPS + 1,
                },
            )
            return [_whole(row) for row in await cursor.fetchall()]

    async def stats(self, first_day: date, last_day: date) -> Stats:
        """Add up what all accounts used, both days of UTC included."""
        days = {"first_day": first_day, "last_day": last_day}
        async with (
            self._pool.connection() as connection,
            connection.transaction(),
            connection.cursor(row_factory=dict_row) as cursor,
        ):
            await cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            # For some accounts of thousands a plan by averages reads whole months.
            await cursor.execute("SET LOCAL jit = off")
            await cursor.execute(_STATS, days)
            rows = [_whole(row) for row in await cursor.fetchall()]
            await cursor.execute(_ACTIVE, days)
            accounts = await cursor.fetchall()
        nothing: Row = dict.fromkeys(
            ("requests", "failed", "input_tokens", "output_tokens", "price", "cost_picos"), 0
        )
        return Stats(
            total=next((row for row in rows if row["level"] == _ALL), nothing),
            by_day=[row for row in rows if row["level"] == _BY_DAY],
            by_model=[row for row in rows if row["level"] == _BY_MODEL],
            by_tier=[row for row in rows if row["level"] == _BY_TIER],
            failed=[row for row in rows if row["level"] == _BY_ERROR and row["error_code"]],
            accounts=accounts,
        )


def _hour_up(moment: datetime) -> datetime:
    floor = moment.replace(minute=0, second=0, microsecond=0)
    return floor if floor == moment else floor + _HOUR


def _whole(row: Row) -> Row:
    """Make integers of PostgreSQL's sums, which are numeric."""
    return {
        name: int(value) if isinstance(value, Decimal) else value for name, value in row.items()
    }
