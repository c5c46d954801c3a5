"""Keeps one child alive: starts it, starts it again when it dies, takes it down at the end."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from proxy.errors import ConfigurationError

logger = logging.getLogger(__name__)

POLL_S = 0.25
FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0


class ChildFailedError(ConfigurationError):
    """A child did not start; the text holds the end of its log."""


class Keeper:
    """A thread that owns a child for as long as it is wanted.

    `bring_up` blocks until the child serves, returns early once the event it is given is set, and
    raises ChildFailedError; `take_down` ends the child and may find none. Both run in this thread
    and in no other: a child that asked the kernel to be killed with its parent is in truth killed
    with the *thread* that started it.
    """

    def __init__(
        self,
        name: str,
        *,
        bring_up: Callable[[threading.Event], None],
        is_alive: Callable[[], bool],
        take_down: Callable[[], None],
    ) -> None:
        self._name = name
        self._bring_up = bring_up
        self._is_alive = is_alive
        self._take_down = take_down
        self._stopping = threading.Event()
        self._started: Future[None] = Future()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the child and wait until it serves; raises ChildFailedError."""
        # A daemon, so that a program that fails without stopping us still ends.
        self._thread = threading.Thread(target=self._run, name=f"keep-{self._name}", daemon=True)
        self._thread.start()
        try:
            self._started.result()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Take the child down and wait for it; harmless if it never started."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._bring_up(self._stopping)
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits in start()
            self._take_down()
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        backoff_s = FIRST_BACKOFF_S
        while not self._stopping.wait(POLL_S):
            if self._is_alive():
                continue
            logger.warning("child died", extra={"child": self._name, "restart_in_s": backoff_s})
            if self._stopping.wait(backoff_s):
                break
            backoff_s = self._revive(backoff_s)
        self._take_down()

    def _revive(self, backoff_s: float) -> float:
        """Start the child again; returns how long to wait if it dies once more."""
        try:
            self._bring_up(self._stopping)
        except (ConfigurationError, OSError) as error:
            logger.error("child does not start", extra={"child": self._name, "error": str(error)})  # noqa: TRY400
            return min(backoff_s * 2, LONGEST_BACKOFF_S)
        if not self._stopping.is_set():
            logger.warning("child is back", extra={"child": self._name})
        return FIRST_BACKOFF_S


def rotate(log: Path) -> None:
    """Begin an empty log file, keeping the one before as `….1`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(log.with_name(log.name + ".1"))
    log.touch(mode=0o600)


def tail(log: Path, *, lines: int = 25) -> str:
    """Return the end of a log file, for an error's text."""
    if not log.exists():
        return "(no log)"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16_384))
        text = file.read().decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:]) or "(the log is empty)"
