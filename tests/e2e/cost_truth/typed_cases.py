"""Responses and Messages: what each case costs, reckoned by hand from the models' prices."""

from collections.abc import Iterator
from dataclasses import replace

from tests.e2e.cost_truth.case import VOID, Case, billed, free, review
from tests.e2e.cost_truth.text_cases import CACHED, CUT, REFUSAL, RESET, SILENT
from tests.support.provider import Reply

# Read from the cache, and written to it for five minutes and for an hour.
_CACHES = Reply(cached_tokens=1000, cache_write_tokens=300, cache_write_1h_tokens=100)
_CACHES_RECKONED = (
    "10 x 0.000001 + 1000 x 0.0000001 + 200 x 0.00000125 + 100 x 0.000002 + 5 x 0.00001"
)
_OWN_KEY = {"x-provider-key": "sk-of-the-customer"}


def responses_cases() -> list[Case]:
    """Return every case of /v1/responses."""
    return [*_responses("header", streamed=False), *_responses("stream", streamed=True)]


def _responses(source: str, *, streamed: bool) -> Iterator[Case]:
    case = Case(
        endpoint="responses",
        streamed=streamed,
        what="priced",
        model="priced",
        reckoned="10 x 0.000001 + 5 x 0.00001",
        settled=billed("0.00006", "0.00012", source=source),
    )
    yield case
    yield replace(case, what="unpriced", model="unpriced", settled=review("price_missing"))
    yield replace(case, what="free", model="free", settled=free())
    yield replace(
        case,
        what="cached",
        model="cached",
        reply=CACHED,
        reckoned="200 x 0.000001 + 800 x 0.0000001 + 5 x 0.00001",
        settled=billed("0.00033", "0.00066", source=source),
    )
    yield replace(case, what="aborted", hangs_up=True)
    yield replace(case, what="error", reply=REFUSAL, http_status=502, settled=VOID)
    yield replace(
        case,
        what="reasoning",
        model="reasoning",
        reply=Reply(completion_tokens=50, reasoning_tokens=40),
        reckoned="10 x 0.000001 + 40 x 0.00003 + 10 x 0.00001",
        settled=billed("0.00131", "0.00262", source=source),
    )
    yield replace(
        case,
        what="a prompt of 128001",
        model="tiered",
        reply=Reply(prompt_tokens=128_001),
        reckoned="128001 x 0.000002 + 5 x 0.00002",
        settled=billed("0.256102", "0.512204", source=source),
    )
    yield replace(
        case,
        what="flex",
        model="service-tiered",
        body={"service_tier": "flex"},
        reckoned="10 x 0.0000005 + 5 x 0.000005",
        settled=billed("0.00003", "0.00006", source=source),
    )
    yield replace(case, what="cut short by its limit", reply=Reply(finish_reason="length"))
    yield replace(case, what="another model answers", reply=Reply(model="dear"))
    yield replace(
        case,
        what="a model of the Messages API",
        model="claude",
        reply=_CACHES,
        reckoned=_CACHES_RECKONED,
        # LiteLLM's usage does not say there which tokens were written for an hour.
        settled=billed(
            "0.00061", "0.00122", source=source, rated="0.000535", review="cost_mismatch"
        ),
    )
    yield replace(
        case,
        what="own key",
        headers=_OWN_KEY,
        settled=case.settled._replace(status="byok", price="0"),
    )
    failed = Reply(finish_reason="error")
    if not streamed:
        yield replace(case, what="failed", reply=failed)
        yield replace(case, what="cut", reply=CUT, http_status=502, settled=VOID)
        yield replace(case, what="cut by a reset", reply=RESET, http_status=502, settled=VOID)
        yield replace(case, what="no usage", reply=SILENT, settled=review("usage_missing"))
        return
    cut = review("stream_cut")
    yield replace(case, what="failed", reply=failed, settled=cut)
    yield replace(case, what="cut", reply=Reply(cut_after=6), settled=cut)
    yield replace(case, what="cut by a reset", reply=Reply(cut_after=6, reset=True), settled=cut)
    yield replace(case, what="error event", reply=Reply(error_after=6), settled=cut)
    yield replace(
        case,
        what="no usage",
        reply=SILENT,
        reckoned="8 x 0.000001 + 5 x 0.00001, tokens that LiteLLM made up",
        settled=billed("0.000058", "0.000116", source="stream"),
    )
    yield replace(case, what="usage twice", reply=Reply(usage_times=2))


def messages_cases() -> list[Case]:
    """Return every case of /v1/messages; LiteLLM's cost of a stream is that of one event only."""
    return [*_messages("header", streamed=False), *_messages("rated", streamed=True)]


def _messages(source: str, *, streamed: bool) -> Iterator[Case]:
    case = Case(
        endpoint="messages",
        streamed=streamed,
        what="priced",
        model="claude",
        reckoned="10 x 0.000001 + 5 x 0.00001",
        settled=billed("0.00006", "0.00012", source=source),
    )
    yield case
    yield replace(case, what="unpriced", model="claude-unpriced", settled=review("price_missing"))
    yield replace(case, what="free", model="claude-free", settled=free())
    yield replace(
        case,
        what="cached",
        reply=_CACHES,
        reckoned=_CACHES_RECKONED,
        settled=billed("0.00061", "0.00122", source=source),
    )
    yield replace(
        case,
        what="cached, without prices of the cache",
        model="claude-cheap",
        reply=_CACHES,
        reckoned="1310 x 0.0000001 + 5 x 0.0000005",
        settled=billed("0.0001335", "0.000267", source=source),
    )
    yield replace(case, what="aborted", hangs_up=True)
    yield replace(case, what="error", reply=REFUSAL, http_status=502, settled=VOID)
    yield replace(case, what="another model answers", reply=Reply(model="claude-free"))
    yield replace(case, what="a model of the Responses API", model="priced")
    yield replace(
        case,
        what="a model of the Responses API, cached",
        model="cached",
        reply=CACHED,
        reckoned="200 x 0.000001 + 800 x 0.0000001 + 5 x 0.00001",
        settled=billed("0.00033", "0.00066", source=source),
    )
    yield replace(
        case,
        what="own key",
        headers=_OWN_KEY,
        settled=case.settled._replace(status="byok", price="0"),
    )
    if not streamed:
        yield replace(case, what="cut", reply=CUT, http_status=502, settled=VOID)
        yield replace(case, what="cut by a reset", reply=RESET, http_status=502, settled=VOID)
        yield replace(case, what="no usage", reply=SILENT, settled=review("usage_missing"))
        return
    cut = review("stream_cut")
    yield replace(case, what="cut", reply=Reply(cut_after=5), settled=cut)
    yield replace(case, what="cut by a reset", reply=Reply(cut_after=5, reset=True), settled=cut)
    yield replace(case, what="error event", reply=Reply(error_after=5), settled=cut)
    yield replace(
        case,
        what="error event, then usage",
        reply=Reply(error_after=5, keep_usage_after_error=True),
        settled=cut,
    )
    yield replace(case, what="no usage", reply=SILENT, settled=review("usage_missing"))
    yield replace(case, what="usage twice", reply=Reply(usage_times=2))


def bridged_cases() -> Iterator[Case]:
    """Yield a model of the Messages API over chat, where the cached tokens are in the prompt."""
    case = Case(
        endpoint="chat.completions",
        what="a model of the Messages API",
        model="claude",
        reply=_CACHES,
        reckoned=_CACHES_RECKONED,
        settled=billed("0.00061", "0.00122", source="header"),
    )
    yield case
    yield replace(case, streamed=True, settled=billed("0.00061", "0.00122", source="stream"))
