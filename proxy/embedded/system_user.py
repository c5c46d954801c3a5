"""PostgreSQL does not run as root: the user that it gets instead, and what that user may reach."""

import hashlib
import logging
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from proxy.errors import ConfigurationError

logger = logging.getLogger(__name__)

USER_NAME = "pgserver"  # the wheel's own choice, so that its other users find the same one
SOCKET_PATH_BYTES = 103  # 107 on Linux, 103 on macOS


class SystemUser(NamedTuple):
    """Another user that a child runs as."""

    uid: int
    gid: int


def for_postgres(binaries: Path, data_dir: Path) -> SystemUser | None:
    """Return the user PostgreSQL runs as, able to reach both paths; None for our own.

    Only root needs another: it is `pgserver`, made if there is none. Raises ConfigurationError
    where it can't be made.
    """
    if os.geteuid() != 0:
        return None
    user = _find() or _make()
    for path in (binaries, data_dir):
        _open_way(path)
    _make_readable(binaries.parent)
    return user


def private_directory(pgdata: Path, user: SystemUser | None) -> Path:
    """Return a short path for the sockets of a server whose own path is too long.

    It is the same at every start. Raises ConfigurationError where somebody else made it first:
    whoever owns the directory could answer in the server's place.
    """
    name = f"tallygate-{hashlib.sha256(os.fsencode(pgdata)).hexdigest()[:16]}"
    parent = Path(tempfile.gettempdir())
    if len(os.fsencode(parent)) > SOCKET_PATH_BYTES // 2:
        parent = Path("/tmp")  # noqa: S108 - the check below is what makes it safe
    directory = parent / name
    uid = os.geteuid() if user is None else user.uid
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        pass
    else:
        if user is not None:
            os.chown(directory, user.uid, user.gid)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or found.st_mode & 0o077:
        msg = f"{directory} is not a private directory of user {uid}: remove it"
        raise ConfigurationError(msg)
    return directory


def _find() -> SystemUser | None:
    try:
        entry = pwd.getpwnam(USER_NAME)
    except KeyError:
        return None
    return SystemUser(entry.pw_uid, entry.pw_gid)


def _make() -> SystemUser:
    useradd = shutil.which("useradd")
    if useradd is not None:
        # Fails where another service makes it at this moment, and then it is there.
        subprocess.run(
            [useradd, "--system", "--user-group", "--no-create-home", USER_NAME],
            check=False,
            capture_output=True,
        )
    user = _find()
    if user is None:
        msg = (
            f"PostgreSQL does not run as root, and user {USER_NAME!r} can't be made: make it, or "
            "start the service as another user"
        )
        raise ConfigurationError(msg)
    return user


def _open_way(path: Path) -> None:
    """Let every user pass through the directories down to a path; nobody learns to list them."""
    for directory in (path, *path.resolve().parents):
        mode = directory.stat().st_mode
        if not mode & stat.S_IXOTH:
            logger.warning("directory opened for passage", extra={"path": str(directory)})
            directory.chmod(stat.S_IMODE(mode) | stat.S_IXOTH)


def _make_readable(tree: Path) -> None:
    """Make the server's own files readable, where a strict umask installed them."""
    if (tree / "bin" / "postgres").stat().st_mode & stat.S_IXOTH:
        return
    for root, _, files in os.walk(tree):
        Path(root).chmod(0o755)
        for name in files:
            file = Path(root, name)
            executable = 0o111 if file.stat().st_mode & stat.S_IXUSR else 0
            file.chmod(0o644 | executable)
