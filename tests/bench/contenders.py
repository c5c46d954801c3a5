"""Who is compared: each in a process of its own, on a loopback port of its own."""

import os
import sys
from collections.abc import Collection, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from proxy.embedded.litellm import LiteLLMChild
from proxy.embedded.postgres import EmbeddedPostgres
from tests.bench import canned, nginx, portkey, services
from tests.bench.names import (
    ACCOUNTS,
    BARE,
    BODIES,
    BODIES_TAKEN_BY,
    BYOK,
    DIRECT,
    FIRST_BYTE,
    FLOOD,
    LABELS,
    LITELLM,
    METERED,
    NGINX,
    PORTKEY,
    SPOOL,
    STARLETTE,
    START,
    STREAMS,
    UNLEDGERED,
    WHOLE,
    WORKERS,
)
from tests.bench.processes import running
from tests.bench.services import MASTER_KEY
from tests.support.service import Service, free_port

PROVIDER_KEY = "key-of-the-customer"

# The two that stand for a stream's ends: see `Stage.streamed`.
_STREAMING = (STREAMS, FIRST_BYTE, FLOOD)
_ALSO: Mapping[str, Collection[str]] = {
    WHOLE: LABELS,
    BODIES: BODIES_TAKEN_BY,
    START: (DIRECT, LITELLM),
}


@dataclass(frozen=True)
class Contender:
    """Somebody who answers chat completions."""

    name: str
    url: str
    pid: int
    headers: Mapping[str, str]
    uses_ledger: bool = False
    # A file with a key a line, which take turns.
    keys: Path | None = None


@dataclass
class Stage:
    """All of them, and what they share."""

    home: Path
    postgres: EmbeddedPostgres
    database_url: str
    # Of the one whose settlements are refused while it is measured.
    spool_database_url: str
    contenders: dict[str, Contender] = field(default_factory=dict[str, Contender])
    # For streams: the source itself, and the service before it.
    streamed: tuple[Contender, ...] = ()
    # Contender -> why it does not take part.
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    # Requests that were answered whole by contenders with a ledger.
    answered: int = 0

    def postgres_pid(self) -> int:
        """Return the server's process, the parent of those that work."""
        pid = self.postgres.pid()
        assert pid is not None
        return pid


@contextmanager
def stage(groups: Collection[str], *, accounts: int) -> Generator[Stage]:
    """Start whom these groups need; ends them all with the context, whatever happens in it.

    `accounts` is how many take turns where many do.
    """
    wanted = {name for group in groups for name in _ALSO.get(group, ())}
    with ExitStack() as stack:
        home = stack.enter_context(services.directory())
        postgres = stack.enter_context(services.postgres())
        found = Stage(
            home, postgres, postgres.url(), services.another_database(postgres, "spooling")
        )
        upstream = ""
        if wanted:
            port, pid = stack.enter_context(nginx.static_upstream(home))
            upstream = _local(port)
            found.contenders[DIRECT] = Contender(DIRECT, upstream, pid, {})
            stack.enter_context(_simple(found, wanted, port))
        stack.enter_context(_services(found, wanted, upstream, accounts))
        if set(groups) & set(_STREAMING):
            source = stack.enter_context(_source(home))
            service = stack.enter_context(
                services.service(home / "streamed", found.database_url, source.url)
            )
            found.streamed = (source, _metered(METERED, service, services.customer(service)))
        # In the order of the tables.
        found.contenders = {n: found.contenders[n] for n in LABELS if n in found.contenders}
        yield found


@contextmanager
def _simple(stage: Stage, wanted: Collection[str], upstream: int) -> Generator[None]:
    """Start those who know no accounts."""
    home = stage.home
    with ExitStack() as stack:
        if NGINX in wanted:
            port, pid = stack.enter_context(nginx.reverse_proxy(home, upstream))
            stage.contenders[NGINX] = Contender(NGINX, _local(port), pid, {})
        for name, module in (
            (STARLETTE, "framework"),
            (BARE, "bare"),
            (UNLEDGERED, "unledgered"),
        ):
            if name in wanted:
                stage.contenders[name] = stack.enter_context(_ours(name, module, home, upstream))
        if LITELLM in wanted:
            stage.contenders[LITELLM] = stack.enter_context(_litellm(home))
        if PORTKEY in wanted:
            try:
                port, pid = stack.enter_context(portkey.gateway(home))
            except portkey.NotInstalledError as error:
                stage.left_out[PORTKEY] = str(error)
                print(f"without {LABELS[PORTKEY]}: {error}", flush=True)
            else:
                headers = portkey.headers(_local(upstream))
                stage.contenders[PORTKEY] = Contender(PORTKEY, _local(port), pid, headers)
        yield


@contextmanager
def _services(
    stage: Stage, wanted: Collection[str], upstream: str, accounts: int
) -> Generator[None]:
    """Start Tallygate as often as it takes part, so that each one's processor time is its own."""
    home, url = stage.home, stage.database_url
    with ExitStack() as stack:

        def start(name: str, database_url: str, workers: int = 1) -> Service:
            return stack.enter_context(
                services.service(home / name, database_url, upstream, workers)
            )

        if METERED in wanted:
            service = start(METERED, url)
            stage.contenders[METERED] = _metered(METERED, service, services.customer(service))
        if BYOK in wanted:
            service = start(BYOK, url)
            own_key = {**services.customer(service), "X-Provider-Key": PROVIDER_KEY}
            stage.contenders[BYOK] = _metered(BYOK, service, own_key)
        if WORKERS in wanted:
            service = start(WORKERS, url, workers=2)
            stage.contenders[WORKERS] = _metered(WORKERS, service, services.customer(service))
        if ACCOUNTS in wanted:
            service = start(ACCOUNTS, url)
            keys = [one.key for one in services.many_customers(service, accounts)]
            path = home / "keys"
            path.write_text("".join(f"{key}\n" for key in keys))
            stage.contenders[ACCOUNTS] = _metered(ACCOUNTS, service, services.bearer(keys[0]), path)
        if SPOOL in wanted:
            service = start(SPOOL, stage.spool_database_url)
            stage.contenders[SPOOL] = _metered(SPOOL, service, services.customer(service))
        yield


def _metered(
    name: str, service: Service, headers: Mapping[str, str], keys: Path | None = None
) -> Contender:
    return Contender(name, service.base_url, service.pid, headers, uses_ledger=True, keys=keys)


@contextmanager
def _ours(name: str, module: str, home: Path, upstream: int) -> Generator[Contender]:
    """Run a part of our stack, `tests.bench.<module>`."""
    port = free_port()
    command = [sys.executable, "-m", f"tests.bench.{module}", str(port), _local(upstream)]
    ready = f"{_local(port)}/health/liveliness"
    with running(command, log=home / f"{name}.log", ready_url=ready) as pid:
        # Any key is good, as long as it looks like one.
        yield Contender(name, _local(port), pid, services.bearer("sk-" + "x" * 43))


@contextmanager
def _source(home: Path) -> Generator[Contender]:
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.source", str(port)]
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
        yield Contender(LITELLM, child.url, child.pid, services.bearer(MASTER_KEY))
    finally:
        child.stop()


def _local(port: int) -> str:
    return f"http://127.0.0.1:{port}"
