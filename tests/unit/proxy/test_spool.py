"""The spool: what was appended is there after a crash, and only one process replays it."""

import errno
import fcntl
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.spool import Spool, decode_lines, encode_line


def payloads(spool: Spool) -> list[bytes]:
    """Take everything, as a replay does, and remove it."""
    found: list[bytes] = []
    for file in spool.take():
        found += file.payloads()
        file.remove()
    return found


def test_appended_payloads_are_replayed_in_order(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append([b"1", b"2"])
    spool.append([b"3"])
    assert spool.depth() > 0
    assert payloads(spool) == [b"1", b"2", b"3"]
    assert (payloads(spool), spool.depth()) == ([], 0)


def test_file_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    living, other = Spool(tmp_path), Spool(tmp_path)
    living.append([b"mine"])
    assert payloads(other) == []
    living.close()
    assert payloads(other) == [b"mine"]


def test_released_file_is_taken_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append([b"1"])
    for file in spool.take():
        file.release()
    assert payloads(spool) == [b"1"]


def test_append_after_take_goes_to_a_new_file(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append([b"1"])
    (taken,) = spool.take()
    spool.append([b"2"])
    assert taken.payloads() == [b"1"]
    taken.remove()
    assert payloads(spool) == [b"2"]


@pytest.mark.parametrize("write", ["append", "set_aside"])
def test_what_is_written_is_on_disk_before_it_returns_and_so_is_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    files: list[int] = []
    directories: list[int] = []
    real = os.fsync

    def fsync(file: int) -> None:
        status = os.fstat(file)
        if stat.S_ISDIR(status.st_mode):
            directories.append(status.st_ino)
        else:
            files.append(status.st_size)
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    spool = Spool(tmp_path)
    if write == "append":
        spool.append([b"payload"])
        assert files == [len(encode_line(b"payload"))]
    else:
        spool.set_aside(b"payload")
        assert files == [len(b"payload\n")]
    assert directories == [tmp_path.stat().st_ino]


def test_half_written_batch_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path)
    spool.append([b"before"])
    real = os.write

    def write(file: int, data: bytes) -> int:
        if len(data) > 4:
            return real(file, data[:4])
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="no space left"):
        spool.append([b"this is too much for the disk"])
    monkeypatch.undo()
    spool.append([b"after"])
    assert payloads(spool) == [b"before", b"after"]


def test_corrupt_line_is_reported_and_the_file_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(tmp_path)
    spool.append([b"good", b"bad", b"fine"])
    (file,) = spool.take()
    file.path.write_bytes(file.path.read_bytes().replace(b"bad", b"BAD"))
    assert file.payloads() == [b"good", b"fine"]
    assert "corrupt" in caplog.text
    assert len(list(tmp_path.glob("*.corrupt"))) == 1
    file.remove()


def test_rejected_settlements_are_kept_for_a_human(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    assert spool.rejected() == 0
    spool.set_aside(b"{}")
    spool.set_aside(b"{}")
    assert spool.rejected() == 2


@given(
    st.lists(st.binary(max_size=20).filter(lambda data: b"\n" not in data), max_size=5),
    st.binary(max_size=9).filter(lambda data: b"\n" not in data),
)
def test_torn_tail_never_hides_or_adds_a_payload(whole: list[bytes], torn: bytes) -> None:
    data = b"".join(map(encode_line, whole)) + torn
    assert decode_lines(data) == (whole, 0)


@pytest.mark.parametrize("was_locked", [True, False])
def test_file_that_another_process_took_for_abandoned_is_not_written_to(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    was_locked: bool,  # noqa: FBT001
) -> None:
    real = fcntl.flock
    taken: list[Path] = []

    def flock(file: int, operation: int) -> None:
        if not taken:  # between our open and our lock, the other one comes by
            taken.extend(tmp_path.glob("*.spool"))
            if was_locked:
                raise BlockingIOError
            taken[0].unlink()
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    spool = Spool(tmp_path)
    spool.append([b"kept"])
    assert taken
    monkeypatch.undo()
    spool.close()
    assert payloads(Spool(tmp_path))[-1:] == [b"kept"]


def waiting_for(path: Path) -> int:
    """How many wait for somebody else's lock on a file."""
    locks = Path("/proc/locks").read_text().splitlines()
    return sum("->" in line and f":{path.stat().st_ino} " in line for line in locks)


def test_what_was_set_aside_is_dropped_without_losing_what_comes_meanwhile(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    path = tmp_path / "rejected.jsonl"
    for payload in (b"1", b"2", b"1"):
        spool.set_aside(payload)
    path.chmod(0o640)

    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with ThreadPoolExecutor(2) as threads:
            # Both wait for the file; whoever is second may find another in its place.
            threads.submit(spool.forget_rejected, b"1")
            threads.submit(spool.set_aside, b"3")
            while waiting_for(path) < 2:
                pass
            fcntl.flock(held, fcntl.LOCK_UN)

    assert sorted(spool.rejected_payloads()) == [b"1", b"2", b"3"]
    assert path.stat().st_mode & 0o777 == 0o640
    assert Spool(tmp_path / "none").oldest_at() is None
