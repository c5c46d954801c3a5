"""Who is compared: each in a process of its own, on a loopback port of its own."""

import os
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

from proxy.db import migrate
from proxy.embedded.litellm import LiteLLMChild
from proxy.embedded.postgres import EmbeddedPostgres
from tests.bench import canned, nginx
from tests.bench.processes import BenchError, running
from tests.support.service import Service, free_port, prepare_service

MASTER_KEY = "sk-master-of-the-benchmark"
PROVIDER_KEY = "key-of-the-customer"
# Enough for some million requests.
CREDITS = "10000000"

DIRECT, NGINX, BARE, UNLEDGERED, METERED, BYOK, LITELLM = (
    "direct",
    "nginx",
    "bare",
    "unledgered",
    "metered",
    "byok",
    "litellm",
)
LABELS = {
    DIRECT: "nginx itself: the upstream, direct",
    NGINX: "nginx as a reverse proxy",
    BARE: "bare relay: our stack without metering",
    UNLEDGERED: "Tallygate without its ledger",
    METERED: "**Tallygate, metered**",
    BYOK: "Tallygate, the customer's own provider key",
    LITELLM: "LiteLLM's proxy, answering by itself, no database",
}


@dataclass(frozen=True)
class Contender:
    """Somebody who answers chat completions."""

    name: str
    url: str
    pid: int
    headers: Mapping[str, str]
    uses_ledger: bool = False


@dataclass(frozen=True)
class Stage:
    """All of them, and what they share."""

    whole: tuple[Contender, ...]
    # For streams: the paced source itself, and the service before it.
    streamed: tuple[Contender, ...]
    postgres: EmbeddedPostgres
    database_url: str

    def postgres_pid(self) -> int:
        """Return the server's process, the parent of those that work."""
        pid = self.postgres.pid()
        assert pid is not None
        return pid


@contextmanager
def stage(*, events_per_s: int, stream_seconds: float) -> Generator[Stage]:
    """Start everybody; ends them all with the context, whatever happens in it."""
    with ExitStack() as stack:
        home = stack.enter_context(_directory())
        postgres = stack.enter_context(_postgres())
        url = postgres.url()
        upstream, upstream_pid = stack.enter_context(nginx.static_upstream(home))
        proxy, proxy_pid = stack.enter_context(nginx.reverse_proxy(home, upstream))
        bare = stack.enter_context(_ours(BARE, home, upstream))
        unledgered = stack.enter_context(_ours(UNLEDGERED, home, upstream))
        source = stack.enter_context(_source(home, events_per_s, stream_seconds))
        litellm = stack.enter_context(_litellm(home))
        # Three services, so that each one's processor time is its own.
        metered = stack.enter_context(_service(home / "metered", url, _local(upstream)))
        byok = stack.enter_context(_service(home / "byok", url, _local(upstream)))
        streamed = stack.enter_context(_service(home / "streamed", url, source.url))
        customer = _bearer(metered.new_key(credits=CREDITS).key)
        own_key = {**customer, "X-Provider-Key": PROVIDER_KEY}
        yield Stage(
            whole=(
                Contender(DIRECT, _local(upstream), upstream_pid, {}),
                Contender(NGINX, _local(proxy), proxy_pid, {}),
                bare,
                unledgered,
                Contender(METERED, metered.base_url, metered.pid, customer, uses_ledger=True),
                Contender(BYOK, byok.base_url, byok.pid, own_key, uses_ledger=True),
                litellm,
            ),
            streamed=(
                source,
                Contender(METERED, streamed.base_url, streamed.pid, customer, uses_ledger=True),
            ),
            postgres=postgres,
            database_url=url,
        )


@contextmanager
def _directory() -> Generator[Path]:
    path = Path(tempfile.mkdtemp(prefix="tallygate-bench-"))
    try:
        yield path
    finally:
        rmtree(path)


@contextmanager
def _postgres() -> Generator[EmbeddedPostgres]:
    """Run PostgreSQL as `tallygate up` does: every commit is on disk."""
    with _directory() as home:
        # Where we are root, PostgreSQL runs as somebody else, who must get there.
        home.chmod(0o711)
        server = EmbeddedPostgres(home)
        try:
            server.start()
            migrate(server.url())
            yield server
        finally:
            server.stop()


@contextmanager
def _ours(name: str, home: Path, upstream: int) -> Generator[Contender]:
    """Run a part of our stack, `tests.bench.<name>`."""
    port = free_port()
    command = [sys.executable, "-m", f"tests.bench.{name}", str(port), _local(upstream)]
    ready = f"{_local(port)}/health/liveliness"
    with running(command, log=home / f"{name}.log", ready_url=ready) as pid:
        # Any key is good, as long as it looks like one.
        yield Contender(name, _local(port), pid, _bearer("sk-" + "x" * 43))


@contextmanager
def _source(home: Path, events_per_s: int, seconds: float) -> Generator[Contender]:
    port = free_port()
    arguments = [str(port), str(events_per_s), str(seconds)]
    command = [sys.executable, "-m", "tests.bench.source", *arguments]
    ready = f"{_local(port)}/model/info"
    with running(command, log=home / "source.log", ready_url=ready) as pid:
        yield Contender(DIRECT, _local(port), pid, {})


@contextmanager
def _litellm(home: Path) -> Generator[Contender]:
    model = {"model": f"openai/{canned.MODEL}", "api_key": "none", "mock_response": canned.TEXT}
    row = {
        "model_name": canned.MODEL,
        "litellm_params": model,
        "model_info": canned.MODEL_INFO,
    }
    child = LiteLLMChild(
        {"model_list": [row]}, data_dir=home, master_key=MASTER_KEY, environ=os.environ
    )
    try:
        child.start()
        assert child.pid is not None
        yield Contender(LITELLM, child.url, child.pid, _bearer(MASTER_KEY))
    finally:
        child.stop()


@contextmanager
def _service(home: Path, database_url: str, litellm_url: str) -> Generator[Service]:
    home.mkdir()
    with closing(
        prepare_service(
            home,
            database_url=database_url,
            litellm_url=litellm_url,
            litellm_key=MASTER_KEY,
        )
    ) as service:
        service.start()
        try:
            yield service
        except BenchError as error:
            error.add_note(f"{service.log_path}, its end:\n{service.log()[-3000:]}")
            raise


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _local(port: int) -> str:
    return f"http://127.0.0.1:{port}"
