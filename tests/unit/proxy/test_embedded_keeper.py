import threading
from pathlib import Path

import pytest

from proxy.embedded import keeper
from proxy.embedded.keeper import ChildFailedError, Keeper, rotate, tail


class Child:
    """Comes up as often as it is told to, and dies when it is told to."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self.alive = False
        self.taken_down = 0
        self.tries = 0
        self.threads: set[str] = set()
        self.changed = threading.Condition()
        self._outcomes = list(outcomes)

    def bring_up(self, stopping: threading.Event) -> None:
        assert not stopping.is_set()
        with self.changed:
            self.tries += 1
            self.threads.add(threading.current_thread().name)
            outcome = self._outcomes.pop(0) if self._outcomes else None
            self.alive = outcome is None
            self.changed.notify_all()
        if outcome is not None:
            raise outcome

    def take_down(self) -> None:
        self.taken_down += 1
        self.alive = False

    def wait_tries(self, tries: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.tries >= tries, timeout=10)


def keep(child: Child) -> Keeper:
    return Keeper(
        "child",
        bring_up=child.bring_up,
        is_alive=lambda: child.alive,
        take_down=child.take_down,
    )


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "POLL_S", 0.001)
    monkeypatch.setattr(keeper, "FIRST_BACKOFF_S", 0.001)


def test_a_child_that_dies_is_started_again_until_it_stays() -> None:
    child = Child(None, ChildFailedError("no"), OSError("no"), None)
    kept = keep(child)
    kept.start()

    child.alive = False
    child.wait_tries(4)
    kept.stop()

    assert (child.tries, child.taken_down) == (4, 1)


def test_a_child_is_started_in_the_thread_that_outlives_it() -> None:
    child = Child()
    kept = keep(child)
    kept.start()
    child.alive = False
    child.wait_tries(2)
    kept.stop()

    assert child.threads == {"keep-child"}


def test_a_child_that_does_not_start_is_taken_down_and_its_error_told() -> None:
    child = Child(ChildFailedError("its log"))
    kept = keep(child)

    with pytest.raises(ChildFailedError, match="its log"):
        kept.start()

    assert child.taken_down == 1


def test_stopping_ends_the_wait_for_the_next_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "FIRST_BACKOFF_S", 3600)
    child = Child()
    kept = keep(child)
    kept.start()
    child.alive = False
    kept.stop()

    assert (child.tries, child.taken_down) == (1, 1)


def test_stopping_what_never_started_does_nothing() -> None:
    child = Child()
    keep(child).stop()

    assert child.taken_down == 0


def test_a_rotated_log_is_empty_private_and_keeps_the_one_before(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "child.log"
    rotate(log)
    log.write_text("first")
    rotate(log)

    assert log.read_text() == ""
    assert log.stat().st_mode & 0o077 == 0
    assert log.with_name("child.log.1").read_text() == "first"


def test_the_tail_of_a_log_is_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    assert tail(log) == "(no log)"
    log.write_text("")
    assert tail(log) == "(the log is empty)"
    log.write_text("".join(f"line {n}\n" for n in range(10_000)))
    assert tail(log, lines=2) == "line 9998\nline 9999"
