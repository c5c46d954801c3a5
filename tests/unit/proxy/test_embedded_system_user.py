import os
import pwd
from pathlib import Path

import pytest

from proxy.embedded import system_user
from proxy.embedded.system_user import SystemUser, private_directory
from proxy.errors import ConfigurationError


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the short directory be made where it disturbs nobody."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(system_user, "SOCKET_PATH_BYTES", 1000)
    return tmp_path


def test_the_short_directory_is_the_same_at_every_start(temporary: Path) -> None:
    first = private_directory(Path("/data/one"), None)

    assert first == private_directory(Path("/data/one"), None)
    assert first != private_directory(Path("/data/two"), None)
    assert first.parent == temporary
    assert first.stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("temporary")
def test_a_directory_that_others_may_enter_is_refused() -> None:
    private_directory(Path("/data"), None).chmod(0o755)

    with pytest.raises(ConfigurationError, match="not a private directory"):
        private_directory(Path("/data"), None)


def test_a_planted_link_is_refused(temporary: Path) -> None:
    directory = private_directory(Path("/data"), None)
    directory.rmdir()
    (temporary / "elsewhere").mkdir(mode=0o700)
    directory.symlink_to(temporary / "elsewhere")

    with pytest.raises(ConfigurationError, match="not a private directory"):
        private_directory(Path("/data"), None)


def test_a_long_temporary_directory_gives_way_to_tmp(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system_user, "SOCKET_PATH_BYTES", 2)
    directory = private_directory(temporary, None)
    directory.rmdir()

    assert directory.parent == Path("/tmp")  # noqa: S108


def test_another_user_is_needed_by_root_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    assert system_user.for_postgres(tmp_path, tmp_path) is None


def test_root_gets_a_user_and_opens_its_way_without_letting_it_look_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binaries = tmp_path / "private" / "wheel" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "postgres").write_text("")
    (binaries / "postgres").chmod(0o700)
    (binaries.parent / "plpgsql.so").write_text("")
    (binaries.parent / "plpgsql.so").chmod(0o600)
    for directory in (tmp_path / "private", binaries.parent, binaries):
        directory.chmod(0o700)
    entry = pwd.getpwuid(os.getuid())

    def found(_name: str) -> pwd.struct_passwd:
        return entry

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(pwd, "getpwnam", found)

    user = system_user.for_postgres(binaries, tmp_path)

    assert user == SystemUser(entry.pw_uid, entry.pw_gid)
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o701
    assert binaries.stat().st_mode & 0o777 == 0o755
    assert (binaries / "postgres").stat().st_mode & 0o777 == 0o755
    assert (binaries.parent / "plpgsql.so").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("useradd", [None, "/bin/false"])
def test_root_without_the_user_and_no_way_to_make_it_is_told_so(
    useradd: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(_name: str) -> pwd.struct_passwd:
        raise KeyError

    def which(_name: str) -> str | None:
        return useradd

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(pwd, "getpwnam", nobody)
    monkeypatch.setattr("shutil.which", which)

    with pytest.raises(ConfigurationError, match="'pgserver' can't be made"):
        system_user.for_postgres(tmp_path, tmp_path)
