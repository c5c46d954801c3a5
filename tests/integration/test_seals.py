"""What was sealed can't be changed without being found out, and is named."""

import asyncio
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from proxy.audit import Finding, check_seals
from proxy.db import make_pool
from proxy.errors import ConfigurationError
from proxy.seals import Seal, Sealer, line_of, read_kept
from tests.integration.money import Money, NewAccount, capture, void

REVIEW = {"status": "needs_review", "review_reason": "usage_missing"}


def with_sealer(url: str, work: Callable[[Sealer], Any]) -> Any:
    async def run() -> Any:
        async with make_pool(url) as pool:
            return await work(Sealer(pool))

    return asyncio.run(run())


def seal(url: str) -> Seal:
    made = with_sealer(url, lambda sealer: sealer.seal())
    assert made is not None
    return made


def broken(url: str, **options: Any) -> dict[str, Finding]:
    return {found.name: found for found in check_seals(url, **options).findings if found.violations}


def tamper(money: Money, statement: str) -> None:
    """Change the past as a superuser can, whatever trigger there is."""
    money.connection.execute("SET session_replication_role = replica")
    money.connection.execute(statement.encode())
    money.connection.execute("SET session_replication_role = origin")


def points(money: Money) -> list[tuple[int, int, int]]:
    rows = money.all(
        "SELECT number, first_seq, last_seq FROM seal_points WHERE account_id = %s"
        " ORDER BY last_seq",
        money.account_id,
    )
    return [(number, first, last) for number, first, last in rows]


@pytest.fixture
def sealed(account: NewAccount, database_url: str) -> Money:
    """Two accounts, two seals, and something that came after."""
    money, other = account(funds=1_000_000), account(funds=500)
    money.settle(capture(money.hold(1000), 600))
    money.settle(void(late := money.hold(100), **REVIEW))
    other.settle(void(other.hold(100)))
    seal(database_url)
    money.one(
        "SELECT outcome FROM resolve_review(%s, %s, 'charge', (SELECT settled_at FROM usage"
        " WHERE request_id = %s), 33, 0, 'review', NULL, NULL, %s, 'me', 'why')",
        *(money.account_id, late["request_id"], late["request_id"], uuid4()),
    )
    money.fund(5, "more", "deposit")
    seal(database_url)
    money.settle(capture(money.hold(10), 7))
    return money


def test_what_nobody_touched_is_as_it_was_sealed(sealed: Money, database_url: str) -> None:
    looked_at = check_seals(database_url)

    assert [found for found in looked_at.findings if found.violations] == []
    assert (looked_at.seals, looked_at.entries, looked_at.entries_away) == (2, 10, 0)
    assert points(sealed) == [(1, 1, 5), (2, 6, 7)]


CHANGES = {
    "an edited amount": (
        (
            "UPDATE entries SET amount = 601, posted_delta = -601, posted_after = posted_after - 1"
            " WHERE kind = 'capture' AND seq = 3"
        ),
        [(3, "changed")],
    ),
    "an edited time": (
        "UPDATE entries SET at = at + interval '1 microsecond' WHERE kind = 'deposit'",
        [(7, "changed")],
    ),
    "an edited reason": (
        "UPDATE entries SET reason = 'none' WHERE kind = 'deposit'",
        [(7, "changed")],
    ),
    "a reason that is no longer empty": (
        "UPDATE entries SET reason = '' WHERE kind = 'capture' AND seq = 3",
        [(3, "changed")],
    ),
    "a deleted entry": (
        "DELETE FROM entries WHERE kind = 'late_capture'",
        [(6, "deleted")],
    ),
    "deleted entries": (
        "DELETE FROM entries WHERE seq IN (2, 3) AND posted_after > 10000",
        [(2, "deleted"), (3, "deleted")],
    ),
    "an added entry": (
        (
            "INSERT INTO entries SELECT account_id, gen_random_uuid(), 1, 'grant', 1, 9, 9, 0, 9,"
            " 0, NULL, NULL, now() FROM entries WHERE kind = 'late_capture'"
        ),
        [(1, "twice")],
    ),
    "entries that changed places": (
        "UPDATE entries SET seq = 9 - seq WHERE seq IN (4, 5) AND posted_after > 10000",
        [(4, "changed"), (5, "changed")],
    ),
    "an edited cost": (
        "UPDATE usage SET cost_picos = 1 WHERE price = 600",
        [(3, "changed")],
    ),
    "edited tokens": (
        "UPDATE usage SET output_tokens = output_tokens + 1 WHERE price = 600",
        [(3, "changed")],
    ),
    "usage that is gone": (
        "DELETE FROM usage WHERE price = 600",
        [(3, "changed")],
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_was_changed_is_named_by_account_and_number(
    case: str, sealed: Money, database_url: str
) -> None:
    statement, expected = CHANGES[case]
    tamper(sealed, statement)

    (found,) = broken(database_url).values()

    assert found.name == "sealed_entries_unchanged"
    assert [(row["seq"], row["is"]) for row in found.rows] == expected
    assert {row["account_id"] for row in found.rows} == {sealed.account_id}


def test_what_is_not_sealed_yet_may_still_come(sealed: Money, database_url: str) -> None:
    sealed.settle(capture(sealed.hold(10), 7))

    assert broken(database_url) == {}


def test_a_repriced_charge_is_still_the_one_that_was_sealed(
    sealed: Money, database_url: str
) -> None:
    (request_id, settled_at) = sealed.one(
        "SELECT request_id, settled_at FROM usage WHERE price = 600"
    )
    assert sealed.one(
        "SELECT outcome FROM resolve_review(%s, %s, 'reprice', %s, 500, 0, 'review', NULL, 1, %s,"
        " 'me', 'why')",
        *(sealed.account_id, request_id, settled_at, uuid4()),
    ) == ("resolved",)

    assert broken(database_url) == {}
    seal(database_url)
    assert broken(database_url) == {}

    tamper(sealed, "UPDATE usage SET input_tokens = 1 WHERE price = 500")
    (found,) = broken(database_url).values()
    assert [row["kind"] for row in found.rows] == ["capture", "correction"]


@pytest.mark.parametrize(
    "statement, expected",
    [
        ("UPDATE seal_points SET digest = sha256('x') WHERE last_seq = 5",
         {"seals_chain", "sealed_entries_unchanged"}),
        ("UPDATE seal_points SET posted_after = 1 WHERE last_seq = 5", {"seals_chain"}),
        ("DELETE FROM seal_points WHERE last_seq = 5", {"seals_chain", "seals_cover_all"}),
        ("DELETE FROM seals WHERE number = 1", {"seals_chain"}),
        ("UPDATE seals SET root = sha256('x') WHERE number = 1", {"seals_chain"}),
        ("UPDATE seals SET sealed_at = now() WHERE number = 1", {"seals_chain"}),
        ("UPDATE seals SET entries = 1 WHERE number = 1", {"seals_chain"}),
        ("DELETE FROM balances WHERE posted > 10000", {"seals_cover_all"}),
    ],
)  # fmt: skip
def test_seals_that_were_changed_are_found_out(
    statement: str, expected: set[str], sealed: Money, database_url: str
) -> None:
    tamper(sealed, statement)
    assert set(broken(database_url)) == expected


def forge(money: Money, what: str = "digest = n.digest, marks = n.marks") -> None:
    """Change an entry, and the hashes of its account that tell of it."""
    tamper(
        money,
        "UPDATE entries SET reason = 'forged' WHERE kind = 'hold' AND seq = 2 AND amount = 1000",
    )
    tamper(
        money,
        f"UPDATE seal_points AS p SET {what} FROM (SELECT q.account_id, q.last_seq,"
        " sha256(string_agg(l.leaf, '' ORDER BY l.seq)) AS digest,"
        " string_agg(substring(l.leaf FOR 4), '' ORDER BY l.seq) AS marks"
        " FROM seal_points AS q CROSS JOIN LATERAL (SELECT e.seq, entry_leaf(e, u, u.cost_picos)"
        " AS leaf FROM entries AS e LEFT JOIN usage AS u ON e.request_id = u.request_id AND e.kind"
        " IN ('capture', 'late_capture') WHERE e.account_id = q.account_id AND e.seq BETWEEN"
        " q.first_seq AND q.last_seq) AS l GROUP BY 1, 2) AS n"
        " WHERE p.account_id = n.account_id AND p.last_seq = n.last_seq",
    )


def forge_roots(money: Money) -> None:
    for number in (1, 2):
        tamper(
            money,
            "UPDATE seals AS s SET previous = coalesce((SELECT o.root FROM seals AS o WHERE"
            f" o.number = s.number - 1), '') WHERE s.number = {number}",
        )
        tamper(
            money,
            "UPDATE seals SET root = seal_root(number, sealed_at, accounts, entries, previous,"
            f" seal_content(number)) WHERE number = {number}",
        )


def test_marks_that_were_changed_with_their_entry_hide_only_which_it_was(
    sealed: Money, database_url: str
) -> None:
    forge(sealed, "marks = n.marks")

    (found,) = broken(database_url).values()

    assert [(row["seq"], row["is"]) for row in found.rows] == [
        ("1 to 5", "changed, and so are its marks")
    ]


def test_who_forges_every_hash_is_betrayed_by_what_was_kept_elsewhere(
    sealed: Money, database_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "seals.jsonl"
    kept = with_sealer(database_url, lambda sealer: sealer.seals())
    file.write_text("".join(f"{line_of(each)}\n" for each in kept))
    assert read_kept(file) == kept
    assert broken(database_url, kept=read_kept(file)) == {}

    forge(sealed)
    assert set(broken(database_url)) == {"seals_chain"}
    forge_roots(sealed)

    assert broken(database_url) == {}
    (found,) = broken(database_url, kept=read_kept(file)).values()
    assert found.name == "seals_as_kept"
    assert [row["seal"] for row in found.rows] == [1, 2]


def test_a_kept_seal_that_is_gone_is_missed(sealed: Money, database_url: str) -> None:
    kept = with_sealer(database_url, lambda sealer: sealer.seals())
    tamper(sealed, "DELETE FROM seal_points WHERE number = 2")
    tamper(sealed, "DELETE FROM seals WHERE number = 2")

    found = broken(database_url, kept=kept)["seals_as_kept"]

    assert [(row["seal"], row["here"]) for row in found.rows] == [(2, "none")]


@pytest.mark.parametrize("content", ["nonsense", "{}", '{"number": 1}'])
def test_a_file_that_is_none_of_ours_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "kept"
    file.write_text(f"\n{content}\n")
    with pytest.raises(ConfigurationError, match="line 2"):
        read_kept(file)
    with pytest.raises(ConfigurationError, match="can't be read"):
        read_kept(tmp_path / "nowhere")


def test_what_is_broken_is_not_sealed(account: NewAccount, database_url: str) -> None:
    money = account(funds=100)
    money.settle(capture(money.hold(10), 7))
    tamper(money, "DELETE FROM entries WHERE kind = 'hold'")

    with pytest.raises(psycopg.errors.CheckViolation, match="mark_each_entry"):
        seal(database_url)
    tamper(money, "DELETE FROM entries")
    with pytest.raises(psycopg.DataError, match="entries are missing"):
        seal(database_url)
    assert money.all("SELECT * FROM seals") == []


def test_a_seal_costs_what_is_new_and_large_accounts_are_sealed_in_parts(
    account: NewAccount, database_url: str
) -> None:
    small, large = account(funds=100), account(funds=100)
    for _ in range(10):
        large.hold(1)

    steps: list[tuple[UUID, bool, int]] = []
    after, is_last = UUID(int=0), False
    while not is_last:
        (step,) = large.all("SELECT * FROM seal_page(1, %s, 4)", after)
        after, is_last, _ = step
        steps.append(step)

    assert [sealed for _, _, sealed in steps] == [4, 4, 4] or [4, 4, 4, 0]
    assert points(small) == [(1, 1, 1)]
    assert [last - first + 1 for _, first, last in points(large)] in ([3, 4, 4], [4, 4, 3])
    assert large.one("SELECT entries, accounts FROM close_seal(1)") == (12, 2)
    assert broken(database_url) == {}
    assert large.all("SELECT * FROM seal_page(1, %s, 4)", UUID(int=0)) == []
    assert large.all("SELECT * FROM close_seal(1)") == []
    assert large.all("SELECT * FROM close_seal(3)") == []


def test_two_replicas_make_one_seal(account: NewAccount, database_url: str) -> None:
    money = account(funds=100)

    async def both(sealer: Sealer) -> list[Seal | None]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(sealer.seal()) for _ in range(2)]
        return [task.result() for task in tasks]

    made = with_sealer(database_url, both)

    assert sum(seal is not None for seal in made) == len(money.all("SELECT * FROM seals"))
    assert points(money) == [(1, 1, 1)]
    assert broken(database_url) == {}


def test_there_is_one_seal_a_day(account: NewAccount, database_url: str) -> None:
    money = account(funds=100)

    async def daily(sealer: Sealer) -> list[Seal | None]:
        first, second = await sealer.seal_daily(), await sealer.seal_daily()
        await asyncio.to_thread(
            tamper, money, "UPDATE seals SET sealed_at = sealed_at - interval '1 day'"
        )
        return [first, second, await sealer.seal_daily()]

    first, second, third = with_sealer(database_url, daily)

    assert first is not None
    assert third is not None
    assert (first.number, second, third.number) == (1, None, 2)


def test_the_service_can_seal_and_no_more(sealed: Money, database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("SET ROLE tallygate_app")
        for statement in (
            "UPDATE tallygate.seals SET root = root",
            "DELETE FROM tallygate.seal_points",
            "INSERT INTO tallygate.audit_runs SELECT * FROM tallygate.audit_runs",
        ):
            with (
                pytest.raises(psycopg.errors.InsufficientPrivilege),
                connection.transaction(),
            ):
                connection.execute(statement.encode())
    with pytest.raises(psycopg.errors.RestrictViolation):
        sealed.all("UPDATE seals SET root = root RETURNING 1")


def dump(url: str, *tables: str) -> str:
    """Return what the server's own pg_dump writes of tables."""
    with psycopg.connect(url) as connection:
        ((pid,),) = connection.execute("SELECT pg_backend_pid()").fetchall()
        program = Path(f"/proc/{pid}/exe").readlink().with_name("pg_dump")
    selected = [f"--table=tallygate.{table}" for table in tables]
    command = [str(program), "--data-only", *selected, url]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_a_seal_is_one_line_of_json(sealed: Money) -> None:
    (row,) = sealed.all("SELECT number, accounts, entries, root FROM seals WHERE number = 1")
    made = with_sealer(sealed.connection.info.dsn, lambda sealer: sealer.seals())[0]
    document = json.loads(line_of(made))
    assert (document["number"], document["accounts"], document["entries"]) == row[:3]
    assert document["root"] == bytes(row[3]).hex()
