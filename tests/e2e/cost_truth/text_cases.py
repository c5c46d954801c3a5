"""Chat and text completions: what each case costs, reckoned by hand from the models' prices."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tests.e2e.cost_truth.case import VOID, Case, billed, free, review
from tests.support.provider import Reply

CUT = Reply(cut_after=2)
RESET = Reply(cut_after=2, reset=True)
ERROR_EVENT = Reply(error_after=2)
# The header spares us the retries of LiteLLM's own client.
REFUSAL = Reply(status=500, headers={"x-should-retry": "false"})
SILENT = Reply(usage={})
CACHED = Reply(prompt_tokens=1000, cached_tokens=800)

_SOUND: dict[str, Any] = {
    "prompt_tokens": 100,
    "completion_tokens": 50,
    "total_tokens": 150,
    "prompt_tokens_details": {"audio_tokens": 60},
    "completion_tokens_details": {"audio_tokens": 40},
}
_SOUND_AND_TEXT: dict[str, Any] = {
    **_SOUND,
    "prompt_tokens_details": {"audio_tokens": 60, "text_tokens": 40},
    "completion_tokens_details": {"audio_tokens": 40, "text_tokens": 10},
}
_CLAIM: dict[str, Any] = {
    "prompt_tokens": 10,
    "completion_tokens": 5,
    "total_tokens": 15,
    "cost": 0.5,
}


def chat_cases() -> list[Case]:
    """Return every case of /v1/chat/completions."""
    return [*_chat("header", streamed=False), *_chat("stream", streamed=True), *_chat_streams()]


def _chat(source: str, *, streamed: bool) -> Iterator[Case]:
    """Yield what is the same for an answer and for a stream, but for the source."""
    case = Case(
        endpoint="chat.completions",
        streamed=streamed,
        what="priced",
        model="priced",
        reckoned="10 x 0.000001 + 5 x 0.00001",
        settled=billed("0.00006", "0.00012", source=source),
        answered="priced",
    )
    yield case
    yield replace(
        case,
        what="unpriced",
        model="unpriced",
        reckoned="",
        settled=review("price_missing"),
        answered="unpriced",
    )
    yield replace(case, what="free", model="free", reckoned="", settled=free(), answered="free")
    yield replace(
        case,
        what="cached",
        model="cached",
        reply=CACHED,
        reckoned="200 x 0.000001 + 800 x 0.0000001 + 5 x 0.00001",
        settled=billed("0.00033", "0.00066", source=source),
        answered="cached",
    )
    yield replace(case, what="aborted", hangs_up=True)
    yield replace(
        case,
        what="error",
        reply=REFUSAL,
        http_status=502,
        reckoned="",
        settled=VOID,
        answered=None,
    )
    yield replace(
        case,
        what="reasoning",
        model="reasoning",
        reply=Reply(completion_tokens=50, reasoning_tokens=40),
        reckoned="10 x 0.000001 + 40 x 0.00003 + 10 x 0.00001",
        settled=billed("0.00131", "0.00262", source=source),
        answered="reasoning",
    )
    yield replace(
        case,
        what="sound",
        model="audio-chat",
        reply=Reply(usage=_SOUND_AND_TEXT),
        reckoned="40 x 0.000001 + 60 x 0.00004 + 10 x 0.00001 + 40 x 0.00008",
        settled=billed("0.00574", "0.01148", source=source),
        answered="audio-chat",
    )
    yield from _tiers(case, source)
    yield replace(
        case,
        what="flex",
        model="service-tiered",
        body={"service_tier": "flex"},
        reckoned="10 x 0.0000005 + 5 x 0.000005",
        settled=billed("0.00003", "0.00006", source=source),
        answered="service-tiered",
    )
    yield replace(
        case,
        what="another model answers",
        reply=Reply(model="dear"),
    )
    yield replace(
        case,
        what="own key",
        headers={"x-provider-key": "sk-of-the-customer"},
        settled=case.settled._replace(status="byok", price="0"),
    )


def _tiers(case: Case, source: str) -> Iterator[Case]:
    for prompt, cached, reckoned, cost, price in (
        (128_000, 0, "128000 x 0.000001 + 5 x 0.00001", "0.12805", "0.2561"),
        (128_001, 0, "128001 x 0.000002 + 5 x 0.00002", "0.256102", "0.512204"),
        (200_001, 0, "200001 x 0.000004 + 5 x 0.00004", "0.800204", "1.600408"),
        (272_001, 0, "272001 x 0.000008 + 5 x 0.00008", "2.176408", "4.352816"),
        (
            300_000,
            100_000,
            "200000 x 0.000008 + 100000 x 0.0000008 + 5 x 0.00008",
            "1.6804",
            "3.3608",
        ),
    ):
        what = f"a prompt of {prompt}" + (f" with {cached} cached" if cached else "")
        yield replace(
            case,
            what=what,
            model="tiered",
            reply=Reply(prompt_tokens=prompt, cached_tokens=cached),
            reckoned=reckoned,
            settled=billed(cost, price, source=source),
            answered="tiered",
        )


def _chat_streams() -> Iterator[Case]:
    """Yield what differs between an answer and a stream."""
    whole = Case(endpoint="chat.completions", what="", model="priced", settled=VOID)
    yield replace(whole, what="cut", reply=CUT, http_status=502)
    yield replace(whole, what="cut by a reset", reply=RESET, http_status=502)
    yield replace(whole, what="no usage", reply=SILENT, settled=review("usage_missing"))
    yield replace(
        whole,
        what="the provider claims a cost",
        reply=Reply(usage=_CLAIM),
        settled=billed("0.00006", "0.00012", source="header"),
    )
    stream = replace(whole, streamed=True)
    yield replace(
        stream,
        what="cut",
        reply=CUT,
        reckoned="8 x 0.000001 + 4 x 0.00001, tokens that LiteLLM made up",
        settled=billed("0.000048", "0.000096", source="stream"),
    )
    yield replace(stream, what="cut by a reset", reply=RESET, settled=review("stream_cut"))
    yield replace(stream, what="error event", reply=ERROR_EVENT, settled=review("stream_cut"))
    yield replace(
        stream,
        what="error event, then usage",
        reply=Reply(error_after=2, keep_usage_after_error=True),
        settled=review("stream_cut"),
    )
    yield replace(
        stream,
        what="no usage",
        reply=SILENT,
        reckoned="8 x 0.000001 + 5 x 0.00001, tokens that LiteLLM made up",
        settled=billed("0.000058", "0.000116", source="stream"),
    )
    yield replace(
        stream,
        what="usage twice",
        reply=Reply(usage_times=2),
        settled=billed("0.00006", "0.00012", source="stream"),
    )
    yield replace(
        stream,
        what="usage asked for",
        body={"stream_options": {"include_usage": True}},
        settled=billed("0.00006", "0.00012", source="stream"),
    )
    yield replace(
        stream,
        what="usage declined",
        body={"stream_options": {"include_usage": False}},
        settled=billed("0.00006", "0.00012", source="stream"),
    )
    yield replace(
        stream,
        what="the provider claims a cost",
        reply=Reply(usage=_CLAIM),
        settled=billed("0.5", "1", source="stream", rated="0.00006", review="cost_mismatch"),
    )
    yield replace(
        stream,
        what="sound without a count of text",
        model="audio-chat",
        reply=Reply(usage=_SOUND),
        reckoned="0.00574, and LiteLLM takes the 40 of sound for text as well: + 40 x 0.00001",
        settled=billed(
            "0.00614", "0.01228", source="stream", rated="0.00574", review="cost_mismatch"
        ),
    )


def completion_cases() -> list[Case]:
    """Return every case of /v1/completions."""
    return [*_completions("header", streamed=False), *_completions("stream", streamed=True)]


def _completions(source: str, *, streamed: bool) -> Iterator[Case]:
    case = Case(
        endpoint="completions",
        streamed=streamed,
        what="priced",
        model="instruct",
        reckoned="10 x 0.0000015 + 5 x 0.000002",
        settled=billed("0.000025", "0.00005", source=source),
    )
    yield case
    yield replace(
        case,
        what="unpriced",
        model="instruct-unpriced",
        reckoned="",
        settled=review("price_missing"),
    )
    yield replace(case, what="free", model="instruct-free", reckoned="", settled=free())
    yield replace(
        case,
        what="cached",
        reply=CACHED,
        reckoned="1000 x 0.0000015 + 5 x 0.000002",
        settled=billed("0.00151", "0.00302", source=source),
    )
    yield replace(case, what="aborted", hangs_up=True)
    yield replace(case, what="error", reply=REFUSAL, http_status=502, reckoned="", settled=VOID)
    yield replace(
        case,
        what="own key",
        headers={"x-provider-key": "sk-of-the-customer"},
        settled=case.settled._replace(status="byok", price="0"),
    )
    if not streamed:
        yield replace(case, what="cut", reply=CUT, http_status=502, settled=VOID)
        yield replace(case, what="cut by a reset", reply=RESET, http_status=502, settled=VOID)
        yield replace(case, what="no usage", reply=SILENT, settled=review("usage_missing"))
        return
    yield replace(
        case,
        what="cut",
        reply=CUT,
        reckoned="8 x 0.0000015 + 4 x 0.000002, tokens that LiteLLM made up",
        settled=billed("0.00002", "0.00004", source="stream"),
    )
    yield replace(case, what="cut by a reset", reply=RESET, settled=review("stream_cut"))
    yield replace(case, what="error event", reply=ERROR_EVENT, settled=review("stream_cut"))
    yield replace(
        case,
        what="no usage",
        reply=SILENT,
        reckoned="8 x 0.0000015 + 5 x 0.000002, tokens that LiteLLM made up",
        settled=billed("0.000022", "0.000044", source="stream"),
    )
    yield replace(case, what="usage twice", reply=Reply(usage_times=2))
