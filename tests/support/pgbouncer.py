"""The real PgBouncer with the project's own configuration, before a server of the tests."""

import os
import shutil
import signal
import subprocess
import time
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import psycopg
import pytest

from tests.support.service import ROOT, free_port

PROGRAM = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"
CONFIGURATION = ROOT / "deploy" / "pgbouncer.ini"
_START_TIMEOUT_S = 10


def read_configuration() -> ConfigParser:
    """Read deploy/pgbouncer.ini."""
    parser = ConfigParser(comment_prefixes=(";", "#"), interpolation=None)
    parser.read_string(CONFIGURATION.read_text())
    return parser


class PgBouncer:
    """Runs it on `home`, which whoever runs PostgreSQL must reach; its logins are `passwords`."""

    def __init__(self, home: Path, database: str, *, passwords: dict[str, str], pool: int) -> None:
        if not Path(PROGRAM).exists():
            pytest.skip("no pgbouncer (Debian: apt-get install pgbouncer)")
        self.port = free_port()
        self._passwords = passwords
        parts = urlsplit(database)
        (socket_dir,) = parse_qs(parts.query)["host"]
        parser = read_configuration()
        parser["databases"]["tallygate"] = (
            f"host={socket_dir} port=5432 dbname={parts.path.lstrip('/')}"
        )
        parser["pgbouncer"].update(
            listen_port=str(self.port),
            auth_file=str(home / "userlist.txt"),
            default_pool_size=str(pool),
            reserve_pool_size="0",
            stats_users=",".join(passwords),
        )
        home.mkdir()
        users = "".join(f'"{name}" "{password}"\n' for name, password in passwords.items())
        (home / "userlist.txt").write_text(users)
        with (home / "pgbouncer.ini").open("w") as file:
            parser.write(file)
        # It refuses to run as root; whoever runs PostgreSQL gets to the socket.
        owner = Path(socket_dir).stat()
        for path in (home, *home.iterdir()):
            os.chown(path, owner.st_uid, owner.st_gid)
        is_root = os.geteuid() == 0
        self.log = home / "pgbouncer.log"
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [PROGRAM, home / "pgbouncer.ini"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                user=owner.st_uid if is_root else None,
                group=owner.st_gid if is_root else None,
                extra_groups=[] if is_root else None,
            )
        self._wait()

    def url(self, user: str, database: str = "tallygate") -> str:
        """Where a login reaches PostgreSQL through it."""
        return (
            f"postgresql://{user}:{quote(self._passwords[user])}@127.0.0.1:{self.port}/{database}"
            "?sslmode=disable&gssencmode=disable"
        )

    def connections(self, user: str) -> tuple[int, int]:
        """Count a login's connections: of clients to it, and of it to PostgreSQL."""
        with psycopg.connect(self.url(user, "pgbouncer"), autocommit=True) as console:
            clients = console.execute("SHOW CLIENTS").fetchall()
            servers = console.execute("SHOW SERVERS").fetchall()
        # The second column is the user, the third the database.
        return tuple(  # type: ignore[return-value]
            sum(row[1] == user and row[2] == "tallygate" for row in rows)
            for rows in (clients, servers)
        )

    def stop(self) -> None:
        """End it at once."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(_START_TIMEOUT_S)

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                psycopg.connect(self.url(next(iter(self._passwords)))).close()
            except psycopg.OperationalError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(
                        f"pgbouncer does not serve: {error}\n{self.log.read_text()[-2000:]}"
                    )
                time.sleep(0.02)
            else:
                return
