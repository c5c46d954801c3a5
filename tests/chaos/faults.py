"""What goes wrong on a bad day: each fault is done to a stage under load, and undone.

A fault returns when its cause is gone. That everything then comes back by itself, and what became
of the money meanwhile, is for others to look at.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.stage import TTL_S, ChaosError, Replica, Stage, wait_for
from tests.chaos.timewarp import library, warped

# Longer than the five seconds for which a replica waits for an answer of PostgreSQL.
_SILENCE_S = 6.0
# Longer than a hold lives without a heartbeat, and the sweeper sleeps.
_BEYOND_TTL_S = TTL_S + 2.0
# Longer than a replica tries to make a settlement durable.
_LAST_RESORT_S = 31.0
# What a replica says when a settlement is neither in PostgreSQL nor on disk.
_NOWHERE = "neither ledger nor spool"


@dataclass(frozen=True)
class Fault:
    """One kind of fault; `what` says what is done, for the table of the report."""

    name: str
    what: str
    inject: Callable[[Stage, random.Random], None]
    # Why it can't be done on this machine; None where it can.
    obstacle: Callable[[], str | None] = lambda: None


def _outage(draw: random.Random) -> float:
    return draw.uniform(0.3, 2.0)


# -------------------------------------------------------------------------------------------------
# Our own processes
# -------------------------------------------------------------------------------------------------


def kill_worker(stage: Stage, draw: random.Random) -> None:
    replica = draw.choice(stage.replicas)
    workers = replica.workers()
    victim = draw.choice(workers)
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: victim not in replica.workers(), "the killed worker to be gone")


def kill_replica(stage: Stage, draw: random.Random) -> None:
    replica = draw.choice(stage.replicas)
    replica.service.kill()
    time.sleep(_outage(draw))
    replica.start()


def kill_both_replicas(stage: Stage, draw: random.Random) -> None:
    for replica in stage.replicas:
        replica.service.kill()
    time.sleep(_outage(draw))
    for replica in stage.replicas:
        replica.start()


def restart_replica(stage: Stage, draw: random.Random) -> None:
    replica = draw.choice(stage.replicas)
    _leave(replica)
    replica.start()


def _leave(replica: Replica) -> None:
    code = replica.service.stop()
    if code != 0:
        raise ChaosError(f"replica {replica.name} ended with {code} after SIGTERM")


def freeze_replica(stage: Stage, draw: random.Random) -> None:
    pids = draw.choice(stage.replicas).processes()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(_BEYOND_TTL_S)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def kill_litellm(stage: Stage, draw: random.Random) -> None:
    stage.provider.kill()
    time.sleep(_outage(draw))
    stage.provider.start()


def kill_real_litellm(stage: Stage, draw: random.Random) -> None:
    del draw
    stage.litellm.kill()


# -------------------------------------------------------------------------------------------------
# PostgreSQL
# -------------------------------------------------------------------------------------------------


def _backends(stage: Stage) -> list[int]:
    rows = stage.rows(
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'tallygate'"
        " AND datname = current_database() ORDER BY pid"
    )
    return [row["pid"] for row in rows]


def terminate_backends(stage: Stage, draw: random.Random) -> None:
    for _ in range(3):
        stage.rows(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'tallygate' AND datname = current_database()"
        )
        time.sleep(draw.uniform(0.05, 0.3))


def kill_backend(stage: Stage, draw: random.Random) -> None:
    with suppress(ProcessLookupError):  # it may have gone by itself just then
        os.kill(draw.choice(_backends(stage)), signal.SIGKILL)
    _wait_postgres(stage)


def freeze_backends(stage: Stage, draw: random.Random) -> None:
    """Stop some backends, with whatever locks they hold, for longer than anybody waits."""
    pids = [pid for pid in _backends(stage) if draw.random() < 0.5]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    time.sleep(_SILENCE_S)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def kill_postmaster(stage: Stage, draw: random.Random) -> None:
    del draw
    before = stage.cluster.server.pid()
    stage.cluster.kill()
    wait_for(lambda: stage.cluster.server.pid() not in {None, before}, "the postmaster's successor")
    _wait_postgres(stage)


def _wait_postgres(stage: Stage) -> None:
    def serves() -> bool:
        with suppress(Exception):
            return bool(stage.rows("SELECT 1"))
        return False

    wait_for(serves, "PostgreSQL to be back")


def _spool_something(stage: Stage) -> None:
    """Wait until somebody's settlement had to go to disk."""
    with suppress(ChaosError):  # nothing was under way just then
        wait_for(lambda: bool(stage.spooled()), "a spool", timeout_s=3)


def crash_postgres(stage: Stage, draw: random.Random) -> None:
    stage.cluster.crash()
    _spool_something(stage)
    time.sleep(_outage(draw))
    stage.cluster.start()


def crash_postgres_and_kill_replicas(stage: Stage, draw: random.Random) -> None:
    stage.cluster.crash()
    _spool_something(stage)
    for replica in stage.replicas:
        replica.service.kill()
    time.sleep(_outage(draw))
    stage.cluster.start()
    for replica in stage.replicas:
        replica.start()


def crash_postgres_and_restart_replica(stage: Stage, draw: random.Random) -> None:
    stage.cluster.crash()
    _spool_something(stage)
    replica = draw.choice(stage.replicas)
    _leave(replica)
    stage.cluster.start()
    replica.start()


# -------------------------------------------------------------------------------------------------
# The network between
# -------------------------------------------------------------------------------------------------


def cut_connections(stage: Stage, draw: random.Random) -> None:
    for _ in range(8):
        draw.choice(stage.replicas).wire.cut()
        time.sleep(draw.uniform(0.02, 0.3))


def lose_commits(stage: Stage, draw: random.Random) -> None:
    """Lose what was committed, once and then so often that nobody can ask again."""
    for count in (1, 1, 2, 6):
        wire = draw.choice(stage.replicas).wire
        goal = wire.lost + count
        wire.lose_commits(count)
        with suppress(ChaosError):
            wait_for(lambda wire=wire, goal=goal: wire.lost >= goal, "lost answers", timeout_s=3)
        wire.heal()


def delay_answers(stage: Stage, draw: random.Random) -> None:
    for replica in stage.replicas:
        replica.wire.slow(draw.uniform(0.1, 0.8))
    time.sleep(3)
    _heal(stage)


def silence(stage: Stage, draw: random.Random) -> None:
    draw.choice(stage.replicas).wire.stall()
    time.sleep(_SILENCE_S)
    _heal(stage)


def partition(stage: Stage, draw: random.Random) -> None:
    draw.choice(stage.replicas).wire.part()
    time.sleep(_BEYOND_TTL_S)
    _heal(stage)


def partition_and_kill(stage: Stage, draw: random.Random) -> None:
    replica = draw.choice(stage.replicas)
    replica.wire.part()
    _spool_something(stage)
    time.sleep(_outage(draw))
    replica.service.kill()
    _heal(stage)
    # Its holds are given up before what it knew of them is known.
    time.sleep(_BEYOND_TTL_S)
    replica.start()


def _heal(stage: Stage) -> None:
    for replica in stage.replicas:
        replica.wire.heal()


# -------------------------------------------------------------------------------------------------
# Disk and time
# -------------------------------------------------------------------------------------------------


def fill_disk(stage: Stage, draw: random.Random) -> None:
    """Have no room for what PostgreSQL can't take; then one of the two comes back."""
    replica = draw.choice(stage.replicas)
    with _full_disk(replica) as (filler, is_noticed):
        time.sleep(_outage(draw))
        if draw.random() < 0.5:
            filler.unlink()
            if is_noticed:
                wait_for(lambda: bool(_waiting(replica)), "a spool", timeout_s=5)
        replica.wire.heal()


def fill_disk_for_long(stage: Stage, draw: random.Random) -> None:
    """Have no room for longer than answers are held back: they are broken off."""
    with _full_disk(draw.choice(stage.replicas)):
        time.sleep(_LAST_RESORT_S)


@contextmanager
def _full_disk(replica: Replica) -> Generator[tuple[Path, bool]]:
    """Have a replica's spool on a full disk, and PostgreSQL out of its reach.

    Yields what fills it, and whether a charge was under way that found neither.

    The disk is a tmpfs in a mount namespace of the replica's own: it vanishes with it.
    """
    _leave(replica)
    replica.spool.mkdir(parents=True, exist_ok=True)
    script = f'mount -t tmpfs -o size=64k tmpfs "{replica.spool}" && exec "$0" serve'
    replica.start_through(["unshare", "--mount", "sh", "-c", script])
    wait_for(replica.is_up, "the replica with the small disk")
    said = replica.service.log().count(_NOWHERE)
    filler = _spool_inside(replica) / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    replica.wire.part()
    with suppress(ChaosError):  # nothing was under way just then
        wait_for(lambda: replica.service.log().count(_NOWHERE) > said, "a full disk", timeout_s=5)
    yield filler, replica.service.log().count(_NOWHERE) > said
    filler.unlink(missing_ok=True)
    replica.wire.heal()
    wait_for(lambda: not _waiting(replica), "the small spool to be replayed")
    _leave(replica)
    replica.start()


def _spool_inside(replica: Replica) -> Path:
    """Its spool as the replica itself sees it."""
    return Path(f"/proc/{replica.service.pid}/root") / str(replica.spool).lstrip("/")


def _waiting(replica: Replica) -> list[str]:
    """Spool files with something in them."""
    found: list[str] = []
    for path in _spool_inside(replica).glob("*.spool"):
        with suppress(FileNotFoundError):
            if path.stat().st_size:
                found.append(path.name)
    return found


def _no_mounts() -> str | None:
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    mounting = ["unshare", "--mount", "mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", "/mnt"]
    done = subprocess.run(mounting, capture_output=True, check=False)
    return None if done.returncode == 0 else "this user may not mount"


def step_clock(stage: Stage, draw: random.Random) -> None:
    """Step the clock of a replica: ids are made from it."""
    replica = draw.choice(stage.replicas)
    for _ in range(3):
        replica.step_clock(draw.choice([-40, -1, 1, 70]) * 86_400 * draw.random())
        time.sleep(0.7)
        replica.step_clock(draw.choice([-3600, -5, 5, 3600]))
        time.sleep(0.5)
    replica.step_clock(0)


def step_postgres_clock(stage: Stage, draw: random.Random) -> None:
    """Step PostgreSQL's clock, by which holds expire: forth beyond every hold, then back."""
    with warped(stage.cluster) as clock:
        for offset_s in (TTL_S * draw.uniform(2, 200), 0, -draw.uniform(1, 600), 0):
            clock.step(offset_s)
            time.sleep(2.2)  # it looks once a second


def _no_faketime() -> str | None:
    return None if library() is not None else "libfaketime is not installed"


FAULTS = [
    Fault("worker killed", "`kill -9` of a worker", kill_worker),
    Fault("replica killed", "`kill -9` of a replica with its workers", kill_replica),
    Fault("both replicas killed", "`kill -9` of everything that serves", kill_both_replicas),
    Fault("SIGTERM", "a replica is stopped with SIGTERM under load, and started", restart_replica),
    Fault(
        "replica frozen",
        "SIGSTOP of a replica until its holds have expired, then SIGCONT",
        freeze_replica,
    ),
    Fault("LiteLLM killed", "`kill -9` of LiteLLM (stood in for)", kill_litellm),
    Fault("backends ended", "PostgreSQL ends all our connections, three times", terminate_backends),
    Fault("backend killed", "`kill -9` of a PostgreSQL backend: crash recovery", kill_backend),
    Fault(
        "backends frozen",
        "SIGSTOP of half of the backends, locks and all, for 6 s",
        freeze_backends,
    ),
    Fault("postmaster killed", "`kill -9` of the postmaster, and its restart", kill_postmaster),
    Fault("PostgreSQL away", "postmaster and backends killed, back after seconds", crash_postgres),
    Fault(
        "PostgreSQL away, replicas killed",
        "the same, and `kill -9` of both replicas over full spools",
        crash_postgres_and_kill_replicas,
    ),
    Fault(
        "PostgreSQL away, SIGTERM",
        "the same, and a replica is stopped with SIGTERM meanwhile",
        crash_postgres_and_restart_replica,
    ),
    Fault("connections cut", "connections to PostgreSQL are cut, eight times", cut_connections),
    Fault(
        "commits unanswered",
        "connections are cut between a COMMIT and its answer, ten times",
        lose_commits,
    ),
    Fault("answers delayed", "PostgreSQL's answers take 0.1 to 0.8 s longer", delay_answers),
    Fault("silence", "a replica's connections to PostgreSQL go silent for 6 s", silence),
    Fault("partition", "a replica can't reach PostgreSQL until its holds have expired", partition),
    Fault(
        "partition, replica killed",
        "the same, `kill -9` of the replica, and its spool replayed after its holds expired",
        partition_and_kill,
    ),
    Fault(
        "disk full",
        "PostgreSQL out of reach and no room for the spool (on a tmpfs), for seconds",
        fill_disk,
        _no_mounts,
    ),
    Fault(
        "disk full for long",
        "the same until answers that were held back are given up",
        fill_disk_for_long,
        _no_mounts,
    ),
    Fault("replica's clock", "a replica's clock jumps by days, hours and seconds", step_clock),
    Fault(
        "PostgreSQL's clock",
        "PostgreSQL's clock jumps forth beyond every hold, and back (libfaketime)",
        step_postgres_clock,
        _no_faketime,
    ),
]
# What `make test` has time for: one of each kind. A full disk takes two SIGTERMs as well.
_BRIEF = {
    *(kill_worker, kill_litellm, kill_backend, kill_postmaster, crash_postgres_and_kill_replicas),
    *(cut_connections, lose_commits, delay_answers, fill_disk, step_clock),
}
BRIEF_FAULTS = [fault for fault in FAULTS if fault.inject in _BRIEF]
# With the real LiteLLM, for which the provider is stood in.
LITELLM_FAULTS = [
    Fault(
        "real LiteLLM killed", "`kill -9` of the real LiteLLM, and its restart", kill_real_litellm
    )
]
