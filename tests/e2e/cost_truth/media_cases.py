"""Everything that is not streamed as events: what each case costs, reckoned by hand."""

from collections.abc import Iterator
from dataclasses import replace

from tests.e2e.cost_truth.calls import wav
from tests.e2e.cost_truth.case import VOID, Case, Settled, billed, free, review
from tests.e2e.cost_truth.text_cases import CUT, REFUSAL, RESET, SILENT
from tests.support.provider import Reply

_OWN_KEY = {"x-provider-key": "sk-of-the-customer"}


def _usual(case: Case) -> Iterator[Case]:
    """Yield the cases that every endpoint has."""
    yield case
    yield replace(
        case,
        what="unpriced",
        model=f"{case.model}-unpriced",
        reckoned="",
        settled=review("price_missing"),
    )
    yield replace(case, what="free", model=f"{case.model}-free", reckoned="", settled=free())
    yield replace(case, what="aborted", hangs_up=True)
    yield replace(case, what="error", reply=REFUSAL, http_status=502, reckoned="", settled=VOID)
    yield replace(
        case, what="cut by a reset", reply=RESET, http_status=502, reckoned="", settled=VOID
    )
    yield replace(
        case,
        what="own key",
        headers=_OWN_KEY,
        settled=case.settled._replace(status="byok", price="0"),
    )


def embedding_cases() -> Iterator[Case]:
    """Yield every case of /v1/embeddings."""
    case = Case(
        endpoint="embeddings",
        what="priced",
        model="embed",
        reckoned="10 x 0.00000002",
        settled=billed("0.0000002", "0.0000004", source="header"),
    )
    yield from _usual(case)
    yield replace(case, what="cut", reply=CUT, http_status=502, settled=VOID)
    yield replace(case, what="no usage", reply=SILENT, settled=review("usage_missing"))
    yield replace(case, what="base64", body={"encoding_format": "base64"})


def moderation_cases() -> Iterator[Case]:
    """Yield every case of /v1/moderations, where nobody ever says a cost or a usage."""
    case = Case(endpoint="moderations", what="free", model="moderate", settled=free())
    yield case
    yield replace(case, what="unpriced", model="moderate-unpriced", settled=review("price_missing"))
    yield replace(case, what="priced", model="priced", settled=review("usage_missing"))
    yield replace(case, what="aborted", hangs_up=True)
    yield replace(case, what="error", reply=REFUSAL, http_status=502, settled=VOID)
    yield replace(case, what="cut", reply=CUT, http_status=502, settled=VOID)


def rerank_cases() -> Iterator[Case]:
    """Yield every case of /v1/rerank."""
    case = Case(
        endpoint="rerank",
        what="priced",
        model="rerank",
        reckoned="1 x 0.002",
        settled=billed("0.002", "0.004", source="header"),
    )
    yield from _usual(case)
    yield replace(case, what="cut", reply=CUT, http_status=502, settled=VOID)
    yield replace(
        case,
        what="101 documents",
        body={"documents": ["a"] * 101},
        reckoned="2 x 0.002",
        settled=billed("0.004", "0.008", source="header"),
    )
    yield replace(case, what="no usage", reply=SILENT, settled=review("usage_missing"))


def image_cases() -> Iterator[Case]:
    """Yield every case of /v1/images/generations and /v1/images/edits."""
    for endpoint in ("images.generations", "images.edits"):
        case = Case(
            endpoint=endpoint,
            what="priced",
            model="image",
            reckoned="1 x 0.04",
            settled=billed("0.04", "0.08", source="header"),
        )
        yield from _usual(case)
        yield replace(case, what="cut", reply=CUT, http_status=502, settled=VOID)
        yield replace(
            case,
            what="two pictures",
            body={"n": 2},
            reckoned="2 x 0.04",
            settled=billed("0.08", "0.16", source="header"),
        )
        yield replace(case, what="no usage", reply=SILENT)
        tokens = replace(
            case,
            reckoned="10 x 0.000005 + 5 x 0.00004",
            settled=billed("0.00025", "0.0005", source="header"),
        )
        yield replace(tokens, what="by the token", model="gpt-image-tokens")
        yield replace(
            tokens,
            what="by the token, a name that LiteLLM has no cost for",
            model="image-tokens",
            settled=billed("0.00025", "0.0005", source="rated"),
        )
        yield replace(
            tokens,
            what="by the token, no usage",
            model="image-tokens",
            reply=SILENT,
            settled=review("price_missing"),
        )


def speech_cases() -> Iterator[Case]:
    """Yield every case of /v1/audio/speech."""
    case = Case(
        endpoint="audio.speech",
        what="priced",
        model="speech",
        reckoned="5 x 0.000015",
        settled=billed("0.000075", "0.00015", source="rated"),
    )
    yield from _usual(case)
    yield replace(case, what="cut", reply=CUT)
    yield replace(
        case,
        what="a name of LiteLLM's price map",
        model="tts-1",
        settled=billed("0.000075", "0.00015", source="header"),
    )
    yield replace(
        case, what="by the token", model="speech-tokens", settled=review("cost_incomplete")
    )


def transcription_cases() -> Iterator[Case]:
    """Yield every case of /v1/audio/transcriptions."""
    case = Case(
        endpoint="audio.transcriptions",
        what="priced",
        model="transcribe",
        reply=Reply(seconds=7.5),
        reckoned="7.5 x 0.0001",
        settled=billed("0.00075", "0.0015", source="rated"),
    )
    yield from _usual(case)
    yield replace(case, what="cut", reply=CUT, http_status=502, settled=VOID)
    yield replace(case, what="no usage", reply=SILENT, settled=review("usage_missing"))
    yield replace(
        case,
        what="sound that LiteLLM measures",
        body={"file": wav(2)},
        reply=Reply(seconds=2),
        reckoned="2 x 0.0001",
        settled=billed("0.0002", "0.0004", source="header"),
    )
    yield replace(
        case,
        what="sound whose length is told otherwise",
        body={"file": wav(2)},
        settled=billed("0.00075", "0.0015", source="rated", review="cost_mismatch"),
    )
    yield replace(
        case,
        what="sound that claims to be shorter than it is",
        body={"file": wav(7.5, claims=0.1)},
        settled=billed("0.00075", "0.0015", source="rated", review="cost_mismatch"),
    )
    yield replace(
        case,
        what="seconds that the provider rounds up",
        body={"file": wav(1.5)},
        reply=Reply(seconds=2),
        reckoned="2 x 0.0001",
        settled=billed("0.0002", "0.0004", source="rated"),
    )
    yield replace(
        case,
        what="a duration in the answer",
        body={"response_format": "verbose_json"},
        settled=billed("0.00075", "0.0015", source="header"),
    )
    yield replace(case, what="text", body={"response_format": "text"})
    yield replace(
        case,
        what="subtitles",
        body={"response_format": "srt", "file": wav(2)},
        reckoned="2 x 0.0001, as LiteLLM measures it",
        settled=Settled("billed", "header", "0.0002", None, "0.0004"),
    )
    yield replace(
        case,
        what="subtitles of sound that LiteLLM can't measure",
        body={"response_format": "srt"},
        reckoned="",
        settled=review("usage_missing"),
    )
    yield replace(
        case,
        what="by the token",
        model="transcribe-tokens",
        reply=Reply(),
        reckoned="10 x 0.000006 + 5 x 0.00001",
        settled=billed("0.00011", "0.00022", source="header"),
    )
    yield replace(
        case,
        what="by the token, text",
        model="transcribe-tokens",
        reply=Reply(),
        body={"response_format": "text"},
        reckoned="10 x 0.000006 + 5 x 0.00001",
        settled=billed("0.00011", "0.00022", source="header"),
    )
    yield replace(
        case,
        endpoint="audio.translations",
        what="LiteLLM has no such endpoint",
        http_status=404,
        reckoned="",
        settled=VOID,
    )
