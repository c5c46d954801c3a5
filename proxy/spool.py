"""The spool: settlements that PostgreSQL can't take now, fsynced to this machine's disk.

One file a process, held by an exclusive lock while its owner lives, so that whoever starts next on
the same directory knows which files are abandoned and replays them. A line is the CRC-32 of its
payload in hex, a space, the payload, a newline. A line torn by a crash fails its CRC; it was never
acknowledged to anybody, so it is skipped at a file's end and reported anywhere else.
"""

import fcntl
import logging
import os
import threading
import zlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from proxy.ids import uuid7

log = logging.getLogger(__name__)

_REJECTED = "rejected.jsonl"


def encode_line(payload: bytes) -> bytes:
    """Frame one payload, which holds no newline."""
    return b"%08x %b\n" % (zlib.crc32(payload), payload)


def decode_lines(data: bytes) -> tuple[list[bytes], int]:
    """Payloads of a file in order, and how many complete lines were corrupt."""
    payloads: list[bytes] = []
    corrupt = 0
    lines = data.split(b"\n")
    for line in lines[:-1]:  # what follows the last newline is torn, or empty
        checksum, _, payload = line.partition(b" ")
        if len(checksum) == 8 and checksum == b"%08x" % zlib.crc32(payload):
            payloads.append(payload)
        else:
            corrupt += 1
    return payloads, corrupt


class Spool:
    """Appends durably; hands out what is there to be replayed. Its methods block: use a thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = threading.Lock()
        self._file: int | None = None
        self._path: Path | None = None

    def append(self, payloads: Sequence[bytes]) -> None:
        """Write the payloads and return once the disk has them; OSError if it can't."""
        data = b"".join(map(encode_line, payloads))
        with self._lock:
            file = self._open()
            end = os.fstat(file).st_size
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(file, view) :]
                os.fsync(file)
            except OSError:
                # Half a batch must not stay: its items will be settled or spooled some other way,
                # and what is appended next must not continue a torn line.
                os.ftruncate(file, end)
                raise

    def _open(self) -> int:
        while self._file is None:
            path = self._directory / f"{uuid7()}.spool"
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_RDWR, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._sync_names()
            except BlockingIOError:
                os.close(file)  # another process took it for abandoned before we had locked it
                continue
            except OSError:
                os.close(file)
                raise
            if os.fstat(file).st_nlink == 0:
                os.close(file)  # that process has replayed and removed it already
                continue
            self._file, self._path = file, path
        return self._file

    def _sync_names(self) -> None:
        # The name of a file must survive a crash as well as its bytes.
        directory = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def take(self) -> list["SpoolFile"]:
        """Files to be replayed: our own up to now, and those whose owner is gone; oldest first."""
        with self._lock:
            own, self._file = self._file, None
            path, self._path = self._path, None
        taken: list[SpoolFile] = []
        if own is not None and path is not None:
            taken.append(SpoolFile(path, own))
        for other in self._directory.glob("*.spool"):
            if other == path:
                continue
            file = _try_lock(other)
            if file is not None:
                taken.append(SpoolFile(other, file))
        return sorted(taken, key=lambda item: item.path.name)

    def depth(self) -> int:
        """How many bytes wait in the directory, all processes together."""
        return sum(_size(path) for path in self._directory.glob("*.spool"))

    def oldest_at(self) -> float | None:
        """When the oldest of what waits was spooled, in Unix seconds; None where nothing waits."""
        # A file is replayed whole, so its name, a uuidv7, tells when its first line came.
        return min(
            (
                int(path.name[:13].replace("-", ""), 16) / 1000
                for path in self._directory.glob("*.spool")
                if _size(path)
            ),
            default=None,
        )

    def set_aside(self, payload: bytes) -> None:
        """Keep a settlement that the ledger does not take where an operator finds it."""
        with self._rejected() as file:
            file.seek(0, os.SEEK_END)
            file.write(payload + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._sync_names()

    def rejected(self) -> int:
        """How many settlements were set aside and wait for a human."""
        return len(self.rejected_payloads())

    def rejected_payloads(self) -> list[bytes]:
        """Read what was set aside, oldest first."""
        path = self._directory / _REJECTED
        return path.read_bytes().splitlines() if path.exists() else []

    def forget_rejected(self, payload: bytes) -> None:
        """Drop a settlement that was set aside, now that it is in the ledger or given up."""
        with self._rejected() as file:
            lines = file.read().splitlines()
            if payload not in lines:
                return
            lines.remove(payload)
            # Renamed when it is whole: of a crash either the old file is left or the new one.
            path = self._directory / _REJECTED
            fresh = path.with_suffix(".new")
            fresh.write_bytes(b"".join(line + b"\n" for line in lines))
            # The service must be able to go on with it, whoever this is.
            owner = os.fstat(file.fileno())
            os.chown(fresh, owner.st_uid, owner.st_gid)
            fresh.chmod(owner.st_mode & 0o777)
            with fresh.open("rb") as written:
                os.fsync(written.fileno())
            fresh.rename(path)

    @contextmanager
    def _rejected(self) -> Generator[IO[bytes]]:
        """Open the file of what was set aside, alone of all processes."""
        path = self._directory / _REJECTED
        while True:
            with path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                # Whoever had the lock before us may have put another file in its place.
                if os.fstat(file.fileno()).st_nlink == 0:
                    continue
                file.seek(0)
                yield file
                return

    def close(self) -> None:
        """Let go of our file; what is in it is replayed by whoever starts next."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = self._path = None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # replayed by another process in this moment
        return 0


def _try_lock(path: Path) -> int | None:
    """Lock an abandoned file; None if its owner lives or another process was faster."""
    try:
        file = os.open(path, os.O_RDWR | os.O_APPEND)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    if not path.exists():  # replayed and removed between our open and our lock
        os.close(file)
        return None
    return file


class SpoolFile:
    """A file that is ours to replay, under its lock until it is removed or released."""

    def __init__(self, path: Path, file: int) -> None:
        self.path = path
        self._file = file

    def payloads(self) -> list[bytes]:
        """Read the settlements in the order in which they were spooled."""
        data = os.pread(self._file, os.fstat(self._file).st_size, 0)
        payloads, corrupt = decode_lines(data)
        if corrupt:
            # The disk lied: keep the file for a human, and replay what is intact.
            self.path.with_suffix(".corrupt").write_bytes(data)
            log.error("spool file is corrupt", extra={"file": self.path.name, "lines": corrupt})
        return payloads

    def remove(self) -> None:
        """Everything in it is in the ledger."""
        self.path.unlink(missing_ok=True)
        os.close(self._file)

    def release(self) -> None:
        """Give it up for now; it is abandoned, and taken again later."""
        os.close(self._file)
