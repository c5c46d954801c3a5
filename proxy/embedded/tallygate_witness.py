"""A witness inside LiteLLM: it tells Tallygate what each call cost, after the fact.

LiteLLM's callbacks know costs that neither its headers nor its streams tell. This module runs in
LiteLLM's process, so it imports nothing of Tallygate: copy it beside LiteLLM's `config.yaml` and
name it there, `litellm_settings: {callbacks: ["tallygate_witness.witness"]}`. The variables
TALLYGATE_WITNESS_URL (where Tallygate is) and TALLYGATE_WITNESS_TOKEN say where it reports to.

No call waits for it and nothing of it reaches LiteLLM: what goes wrong is a report that is
missing, and Tallygate is told how many. Reports hold counts and ids, no word of prompt or answer.
"""

import atexit
import hashlib
import http.client
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, cast
from urllib.parse import urlsplit

from litellm.integrations.custom_logger import CustomLogger

log = logging.getLogger("tallygate_witness")

PATH = "/internal/v1/witness"
URL_VARIABLE = "TALLYGATE_WITNESS_URL"
TOKEN_VARIABLE = "TALLYGATE_WITNESS_TOKEN"  # noqa: S105 - the name of a variable

CAPACITY = 10_000
BATCH = 100
# How long a report waits for others to travel with it.
LINGER_S = 0.1
POST_TIMEOUT_S = 10.0
# How long a batch is sent again before it is given up: longer than a restart of Tallygate.
PATIENCE_S = 300.0
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
# What a LiteLLM that is being stopped spends on the last reports.
LAST_REPORTS_S = 3.0

# What these return was paid for when it was made; LiteLLM shows its usage once more.
_FREE_CALLS = ("get_", "delete_", "cancel_", "list_")
# Sent again these would be refused again.
_FINAL_REFUSALS = frozenset({400, 413})

Report = dict[str, object]


class Outbox:
    """Reports on their way: bounded, sent in batches by a thread of its own, the oldest lost first.

    A thread and not a task, so that neither the load on LiteLLM's loop nor its end stops it.
    """

    def __init__(self, post: Callable[[bytes], int], *, capacity: int = CAPACITY) -> None:
        """Take what posts a body and returns the status; it may raise OSError."""
        self._post = post
        self._capacity = capacity
        self._lock = threading.Lock()
        self._reports: deque[Report] = deque()
        self._dropped = 0
        self._has_some = threading.Event()
        self._is_full = threading.Event()
        self._is_closing = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, report: Report) -> None:
        """Queue a report."""
        with self._lock:
            if len(self._reports) >= self._capacity:
                self._reports.popleft()
                self._dropped += 1
            self._reports.append(report)
            self._wake()

    def miss(self) -> None:
        """Count a report that could not be made."""
        with self._lock:
            self._dropped += 1
            self._wake()

    def close(self, timeout_s: float = LAST_REPORTS_S) -> None:
        """Send what is left, once and for so long."""
        self._is_closing.set()
        self._is_full.set()
        self._has_some.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _wake(self) -> None:
        # At the first report and not before: a worker that LiteLLM forks has no threads.
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tallygate", daemon=True)
            self._thread.start()
        self._has_some.set()
        if len(self._reports) >= BATCH:
            self._is_full.set()

    def _run(self) -> None:
        while True:
            self._has_some.wait()
            self._is_full.wait(LINGER_S)
            reports, dropped = self._take()
            if reports or dropped:
                self._send(reports, dropped)
            elif self._is_closing.is_set():
                return

    def _take(self) -> tuple[list[Report], int]:
        with self._lock:
            reports = [self._reports.popleft() for _ in range(min(BATCH, len(self._reports)))]
            dropped, self._dropped = self._dropped, 0
            if not self._is_closing.is_set():
                if not self._reports:
                    self._has_some.clear()
                if len(self._reports) < BATCH:
                    self._is_full.clear()
            return reports, dropped

    def _send(self, reports: list[Report], dropped: int) -> None:
        """Send a batch until it is taken, or refused for good, or there is no patience left."""
        body = json.dumps({"reports": reports, "dropped": dropped}).encode()
        give_up_at = time.monotonic() + PATIENCE_S
        pause_s = FIRST_PAUSE_S
        while True:
            problem = self._try(body)
            if problem is None:
                return
            is_final = problem in _FINAL_REFUSALS or self._is_closing.is_set()
            if is_final or time.monotonic() >= give_up_at:
                log.error("%d reports are lost: %s", len(reports), problem)
                if not self._is_closing.is_set():
                    with self._lock:
                        self._dropped += len(reports) + dropped
                return
            if pause_s == FIRST_PAUSE_S:
                log.warning("Tallygate takes no reports, trying again: %s", problem)
            self._is_closing.wait(pause_s)
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    def _try(self, body: bytes) -> object | None:
        """Post once; returns None where it was taken, else the status or the error."""
        try:
            status = self._post(body)
        except (OSError, http.client.HTTPException) as error:
            return repr(error)
        return None if 200 <= status < 300 else status


class Witness(CustomLogger):
    """LiteLLM's callback: makes a report of each call that came from Tallygate."""

    def __init__(self, outbox: Outbox | None) -> None:
        """Take where reports go; None where this LiteLLM is not set up to report."""
        super().__init__()  # pyright: ignore[reportUnknownMemberType] - LiteLLM's **kwargs
        self._outbox = outbox

    async def async_log_success_event(
        self,
        kwargs: Any,  # noqa: ANN401 - as LiteLLM has them
        response_obj: Any,  # noqa: ANN401
        start_time: Any,  # noqa: ANN401
        end_time: Any,  # noqa: ANN401
    ) -> None:
        """Report a call that LiteLLM takes for answered."""
        del end_time
        self._report(lambda: report_of(kwargs, response_obj, start_time, "success"))

    async def async_log_failure_event(
        self,
        kwargs: Any,  # noqa: ANN401
        response_obj: Any,  # noqa: ANN401
        start_time: Any,  # noqa: ANN401
        end_time: Any,  # noqa: ANN401
    ) -> None:
        """Report a failed attempt; of several that fail LiteLLM tells the first alone."""
        del end_time
        self._report(lambda: report_of(kwargs, response_obj, start_time, "failure"))

    async def async_post_call_failure_hook(
        self,
        request_data: Any,  # noqa: ANN401
        original_exception: Exception,
        user_api_key_dict: Any,  # noqa: ANN401
        traceback_str: str | None = None,
    ) -> None:
        """Report how many attempts there were where all of them failed."""
        del original_exception, user_api_key_dict, traceback_str
        self._report(lambda: report_of_failures(request_data))

    def _report(self, make: Callable[[], Report | None]) -> None:
        if self._outbox is None:
            return
        try:
            report = make()
        except Exception:  # whatever LiteLLM hands over, its call must not suffer from it
            log.exception("a report could not be made")
            self._outbox.miss()
            return
        if report is not None:
            self._outbox.add(report)


def report_of(
    kwargs: Mapping[str, Any], response: object, started_at: object, outcome: str
) -> Report | None:
    """Make a report of what LiteLLM hands to a callback; None where it is not Tallygate's."""
    params = _members(kwargs.get("litellm_params"))
    account_id, call_id = _account(params), kwargs.get("litellm_call_id")
    call_type = str(kwargs.get("call_type")).removeprefix("a")
    if account_id is None or not isinstance(call_id, str) or call_type.startswith(_FREE_CALLS):
        return None
    if outcome == "failure" and kwargs.get("api_call_start_time") is None:
        return None  # LiteLLM refused it itself: no provider was asked
    metadata = {**_members(params.get("litellm_metadata")), **_members(params.get("metadata"))}
    deployment = _members(params.get("model_info")).get("id")
    deployment = deployment or _members(metadata.get("model_info")).get("id")
    logged = _members(kwargs.get("standard_logging_object"))
    retries, fallbacks = (
        _count(metadata, "attempted_retries"),
        _count(metadata, "attempted_fallbacks"),
    )
    return {
        "call_id": call_id,
        "account_id": account_id,
        "outcome": outcome,
        "cost": _number_text(kwargs.get("response_cost")),
        # A surcharge that LiteLLM may be set to add; it is in the cost.
        "margin": _number_text(_members(logged.get("cost_breakdown")).get("margin_total_amount")),
        "usage": _usage(response),
        "model": _text(_member(response, "model")),
        "deployment": _text(deployment),
        # Neither times nor ids of answers: LiteLLM logs an attempt twice with new ones.
        "attempt": _digest(outcome, deployment, fallbacks, retries),
        "attempts": max(_failed_attempts(metadata), retries) + 1,
        "started_at": started_at.timestamp() if isinstance(started_at, datetime) else None,
    }


def report_of_failures(request: Mapping[str, Any]) -> Report | None:
    """Make a report of a call none of whose attempts succeeded; None where there was but one."""
    account_id, call_id = _account(request), request.get("litellm_call_id")
    metadata = {**_members(request.get("litellm_metadata")), **_members(request.get("metadata"))}
    attempts = _failed_attempts(metadata)
    if account_id is None or not isinstance(call_id, str) or attempts < 2:
        return None
    return {
        "call_id": call_id,
        "account_id": account_id,
        "outcome": "failure",
        "attempt": _digest("all", attempts),
        "attempts": attempts,
    }


def _account(params: Mapping[str, Any]) -> str | None:
    request = _members(params.get("proxy_server_request"))
    return _text(_members(request.get("headers")).get("x-tallygate-account"))


def _failed_attempts(metadata: Mapping[str, Any]) -> int:
    """Count the attempts that the router gave up on; it lists the last of a fallback twice."""
    records = metadata.get("previous_models")
    if not isinstance(records, list | tuple):
        return 0
    return len(
        {
            (
                record.get("model_group"),
                record.get("deployment_id"),
                record.get("attempted_retries"),
            )
            for record in map(_members, cast("list[object]", records))
        }
    )


def _usage(response: object) -> object | None:
    usage = _member(response, "usage")
    dump = getattr(usage, "model_dump", None)
    return _counts(dump() if callable(dump) else usage) or None


def _counts(value: object) -> dict[str, object]:
    """Keep the numbers of a usage, in it and in its details: nothing else may leave."""
    counts: dict[str, object] = {}
    for name, member in _members(value).items():
        if isinstance(member, int | float) and not isinstance(member, bool):
            counts[name] = member
        elif isinstance(member, Mapping) and (details := _counts(cast("object", member))):
            counts[name] = details
    return counts


def _member(value: object, name: str) -> object:
    if isinstance(value, Mapping):
        return cast("Mapping[str, object]", value).get(name)
    return getattr(value, name, None)


def _members(value: object) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def _count(members: Mapping[str, Any], name: str) -> int:
    value = members.get(name)
    return value if type(value) is int and value > 0 else 0


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _number_text(value: object) -> str | None:
    """Return a number in its shortest digits, which is what LiteLLM's header has."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return repr(value) if is_number else None


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def poster(url: str, token: str) -> Callable[[bytes], int]:
    """Return what posts to Tallygate at that URL, each time over a connection of its own."""
    parts = urlsplit(url)
    is_secure = parts.scheme == "https"
    connect = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        msg = f"{URL_VARIABLE} must be a URL like http://127.0.0.1:4000"
        raise ValueError(msg)
    host, path = parts.hostname, parts.path.rstrip("/") + PATH
    headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}

    def post(body: bytes) -> int:
        connection = connect(host, parts.port, timeout=POST_TIMEOUT_S)
        try:
            connection.request("POST", path, body, headers)
            return connection.getresponse().status
        finally:
            connection.close()

    return post


def make_witness(environ: Mapping[str, str]) -> Witness:
    """Make the callback; it is silent, and says so, where a variable is missing."""
    url, token = environ.get(URL_VARIABLE), environ.get(TOKEN_VARIABLE)
    if not url or not token:
        log.warning("nothing is reported: %s and %s are not set", URL_VARIABLE, TOKEN_VARIABLE)
        return Witness(None)
    outbox = Outbox(poster(url, token))
    atexit.register(outbox.close)
    return Witness(outbox)


witness = make_witness(os.environ)
