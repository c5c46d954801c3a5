"""Settings: the file, the environment over it, and what is said of a mistake."""

from pathlib import Path

import pytest

from proxy.errors import ConfigurationError
from proxy.settings import load_settings


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config.yaml of the test's own."""
    path = tmp_path / "config.yaml"
    path.write_text("{}")
    monkeypatch.setenv("TALLYGATE_CONFIG", str(path))
    return path


def test_environment_overrides_the_file_and_the_file_the_defaults(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text("port: 5000\nworkers: 3\nholds: {ttl_s: 60, heartbeat_s: 7}")
    monkeypatch.setenv("TALLYGATE_PORT", "6000")
    monkeypatch.setenv("TALLYGATE_HOLDS__TTL_S", "90")
    settings = load_settings()
    assert (settings.port, settings.workers, settings.host) == (6000, 3, "127.0.0.1")
    assert (settings.holds.ttl_s, settings.holds.heartbeat_s) == (90, 7)


def test_secrets_do_not_show_in_what_is_printed(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del config
    monkeypatch.setenv("TALLYGATE_ADMIN_KEY", "very-secret")
    settings = load_settings()
    assert "very-secret" not in repr(settings) + settings.model_dump_json()


@pytest.mark.parametrize(
    "text, said",
    [
        ("porrt: 1", "porrt"),
        ("port: 99999", "port"),
        ("holds: {ttl: 5}", "holds.ttl"),
        ("holds: {ttl_s: 120}", "twice heartbeat_s"),
        ("credit_usd: -1", "credit_usd"),
        ("credit_usd: abc", "credit_usd"),
        ("credit_usd: .nan", "credit_usd"),
        ("port: [", "not valid YAML"),
        ("workers: 0\nport: -1", "workers"),
    ],
)
def test_mistake_is_named(config: Path, text: str, said: str) -> None:
    config.write_text(text)
    with pytest.raises(ConfigurationError, match=said):
        load_settings()


def test_missing_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TALLYGATE_CONFIG", str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigurationError, match="no such file"):
        load_settings()


@pytest.mark.parametrize("text, nanos", [("0.001", 1_000_000), ("1", 10**9), ("1e-9", 1)])
def test_credit_is_a_whole_number_of_nanos(config: Path, text: str, nanos: int) -> None:
    config.write_text(f'credit_usd: "{text}"')
    assert load_settings().nanos_per_credit == nanos


@pytest.mark.parametrize("text", ["0", "0.0000000001", "0.0010000000001"])
def test_credit_of_a_broken_nano_is_refused(config: Path, text: str) -> None:
    config.write_text(f'credit_usd: "{text}"')
    with pytest.raises(ConfigurationError, match="credit_usd"):
        _ = load_settings().nanos_per_credit
