"""LiteLLM as a supervised child on loopback."""

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from proxy.embedded.keeper import ChildFailedError, Keeper, rotate, tail
from proxy.embedded.litellm_config import WitnessAddress, child_config
from proxy.errors import ConfigurationError

START_TIMEOUT_S = 120
# LiteLLM lets streams end for GRACEFUL_SHUTDOWN_TIMEOUT, 30 s, and then leaves by itself.
STOP_TIMEOUT_S = 35
PROBE_TIMEOUT_S = 2
# Longer than the relay keeps an idle connection, so that it never writes into one being closed.
KEEPALIVE_S = 90
# Runs inside LiteLLM and is never imported here.
_WITNESS = Path(__file__).with_name("tallygate_witness.py")

# PR_SET_PDEATHSIG: a killed parent takes LiteLLM along, which would otherwise hold its port and
# half a gigabyte. The parent may have died before the call, so it is asked for afterwards.
LAUNCHER = """
import os, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv.pop(1)):
    sys.exit("the parent is gone")
from litellm import run_server
sys.argv[0] = "litellm"
run_server()
"""


class LiteLLMChild:
    """One LiteLLM with files under `data_dir/litellm` and its log at `data_dir/logs/litellm.log`.

    `config` is LiteLLM's own configuration; `environ` is where the variables that it names are
    looked up. Without a `port` a free one is taken and kept over restarts. `witness` is where a
    callback inside it reports to, if it shall.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        data_dir: Path,
        master_key: str,
        port: int = 0,
        environ: Mapping[str, str] | None = None,
        witness: WitnessAddress | None = None,
    ) -> None:
        self._child = child_config(
            config,
            master_key=master_key,
            environ=os.environ if environ is None else environ,
            witness=witness,
        )
        self.log_path = data_dir.resolve() / "logs" / "litellm.log"
        self._config_path = data_dir.resolve() / "litellm" / "config.yaml"
        self._reservation = _reserve(port)
        self.port: int = self._reservation.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper = Keeper(
            "litellm",
            bring_up=self._bring_up,
            is_alive=self.is_running,
            take_down=self._take_down,
        )

    def start(self) -> str:
        """Start LiteLLM and wait until it answers; returns its base URL.

        Raises ChildFailedError, with the end of the log, if it ends or is not up in time.
        """
        if find_spec("litellm") is None:
            msg = (
                "LiteLLM is not installed: pip install 'tallygate[embedded]', or name a running "
                "one in TALLYGATE_LITELLM_URL and TALLYGATE_LITELLM_KEY"
            )
            raise ConfigurationError(msg)
        try:
            self._keeper.start()
        except BaseException:
            self._reservation.close()
            raise
        return self.url

    def stop(self) -> None:
        """Let its requests end, then end it."""
        self._keeper.stop()
        self._reservation.close()

    @property
    def pid(self) -> int | None:
        """The process id, None while it is down."""
        return self._process.pid if self._process is not None and self.is_running() else None

    def is_running(self) -> bool:
        """Whether the process exists."""
        return self._process is not None and self._process.poll() is None

    def _bring_up(self, stopping: threading.Event) -> None:
        self._take_down()
        self._write_config()
        rotate(self.log_path)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-P", "-c", LAUNCHER, str(os.getpid()),
                    "--config", str(self._config_path),
                    "--host", "127.0.0.1",
                    "--port", str(self.port),
                    "--num_workers", "1",
                    "--keepalive_timeout", str(KEEPALIVE_S),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._child.environ,
                # A Ctrl-C is for us: LiteLLM serves until our own requests have ended.
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_TIMEOUT_S
        while not stopping.wait(0.1):
            if not self.is_running():
                msg = f"LiteLLM ended at its start; {self._log_tail()}"
                raise ChildFailedError(msg)
            if self._answers():
                return
            if time.monotonic() > deadline:
                msg = f"LiteLLM is not up after {START_TIMEOUT_S} s; {self._log_tail()}"
                raise ChildFailedError(msg)

    def _take_down(self) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PROBE_TIMEOUT_S)
        try:
            connection.request("GET", "/health/liveliness")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _write_config(self) -> None:
        """Write what holds the master key, for our eyes only, and the witness beside it."""
        self._config_path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_WITNESS, self._config_path.with_name(_WITNESS.name))
        self._config_path.unlink(missing_ok=True)
        descriptor = os.open(self._config_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123 - of a descriptor
            yaml.safe_dump(self._child.document, file, sort_keys=False)

    def _log_tail(self) -> str:
        return f"the end of {self.log_path}:\n{tail(self.log_path)}"


def _reserve(port: int) -> socket.socket:
    """Bind a port for LiteLLM without listening on it.

    Nobody else gets the port in the seconds until LiteLLM binds it, nor between its restarts; the
    kernel lets LiteLLM in because both say SO_REUSEADDR and this socket never listens.
    """
    reservation = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        reservation.bind(("127.0.0.1", port))
    except OSError as error:
        reservation.close()
        msg = f"LiteLLM's port {port} is taken on 127.0.0.1: {error.strerror}"
        raise ConfigurationError(msg) from None
    return reservation
