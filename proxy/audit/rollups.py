"""The invariants of usage summed up: hours equal their rows, and days their hours."""

from proxy.audit.invariant import Invariant

ROLLUPS = (
    Invariant(
        "rollups_equal_usage",
        "an hour's rollup is what its rows of usage add up to, unless it is marked or detached",
        "SELECT count(*) FROM usage",
        """
        SELECT
            t.account_id, t.hour, t.key_id, t.model, t.endpoint, t.status,
            sum(t.requests) AS requests_off, sum(t.price) AS price_off,
            sum(t.cost_picos) AS cost_picos_off, sum(t.tokens) AS tokens_off
        FROM (
            SELECT
                u.account_id, usage_hour(u.request_id) AS hour, u.key_id, u.project_id, u.model,
                u.tier, u.endpoint, u.status, u.error_code, 1 AS requests, u.price,
                CASE WHEN NOT u.byok THEN u.cost_picos END AS cost_picos,
                coalesce(u.input_tokens, 0)::numeric + coalesce(u.output_tokens, 0) AS tokens
            FROM usage AS u CROSS JOIN usage_rollup_state AS s
            WHERE u.request_id >= uuid_floor(s.frozen_until)
                AND u.request_id < uuid_floor(s.rolled_until)
            UNION ALL
            SELECT
                r.account_id, r.hour, r.key_id, r.project_id, r.model, r.tier, r.endpoint,
                r.status, r.error_code, -r.requests, -r.price, -r.cost_picos,
                -coalesce(r.input_tokens, 0) - coalesce(r.output_tokens, 0)
            FROM usage_rollups AS r CROSS JOIN usage_rollup_state AS s
            WHERE r.hour >= s.frozen_until
        ) AS t
        WHERE NOT EXISTS (
            SELECT 1 FROM usage_dirty AS m
            WHERE m.account_id = t.account_id AND m.hour = t.hour
        )
        GROUP BY
            t.account_id, t.hour, t.key_id, t.project_id, t.model, t.tier, t.endpoint, t.status,
            t.error_code
        HAVING sum(t.requests) <> 0 OR sum(t.price) <> 0 OR sum(t.cost_picos) <> 0
            OR sum(t.tokens) <> 0
        """,
    ),
    Invariant(
        "rollups_equal_days",
        "the sums of a day are those of its hours' rollups, the detached ones included",
        "SELECT count(*) FROM usage",
        """
        SELECT
            t.day, t.tier, t.model, t.endpoint, t.status, t.error_code,
            sum(t.requests) AS requests_off, sum(t.price) AS price_off,
            sum(t.cost_picos) AS cost_picos_off, sum(t.tokens) AS tokens_off
        FROM (
            SELECT
                d.day, d.tier, d.model, d.endpoint, d.status, d.error_code, d.requests, d.price,
                d.cost_picos, d.input_tokens + d.output_tokens AS tokens
            FROM usage_days AS d
            UNION ALL
            SELECT
                (r.hour AT TIME ZONE 'UTC')::date, r.tier, r.model, r.endpoint, r.status,
                coalesce(r.error_code, ''), -r.requests, -r.price, -r.cost_picos,
                -coalesce(r.input_tokens, 0) - coalesce(r.output_tokens, 0)
            FROM usage_rollups AS r
        ) AS t
        GROUP BY t.day, t.tier, t.model, t.endpoint, t.status, t.error_code
        HAVING sum(t.requests) <> 0 OR sum(t.price) <> 0 OR sum(t.cost_picos) <> 0
            OR sum(t.tokens) <> 0
        """,
    ),
)
