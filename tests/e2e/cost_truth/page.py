"""The page docs/cost-truth.md: words for an operator, and the table as it was seen."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.e2e.cost_truth.case import Case, Settled

ENDPOINTS = (
    "chat.completions",
    "completions",
    "responses",
    "messages",
    "embeddings",
    "moderations",
    "rerank",
    "images.generations",
    "images.edits",
    "audio.speech",
    "audio.transcriptions",
    "audio.translations",
)


class Line(NamedTuple):
    """A case and what the ledger said of it."""

    case: Case
    settled: Settled


class Fact(NamedTuple):
    """Something that LiteLLM reports wrongly or not at all, and the lines that show it."""

    text: str
    shown_by: tuple[str, ...]


FACTS = (
    Fact(
        "Whole answers of chat, completions, responses, messages and embeddings have the cost in "
        "a header, with a breakdown.",
        (
            "chat.completions whole: priced",
            "completions whole: priced",
            "responses whole: priced",
            "messages whole: priced",
            "embeddings whole: priced",
        ),
    ),
    Fact(
        "Pictures, speech, transcriptions and rankings have the header alone, so that a margin "
        "of LiteLLM's can't be told from the cost: it shows as a mismatch.",
        (
            "images.generations whole: priced",
            "images.edits whole: priced",
            "audio.speech whole: a name of LiteLLM's price map",
            "audio.transcriptions whole: sound that LiteLLM measures",
            "rerank whole: priced",
            "rerank whole: a margin in LiteLLM",
        ),
    ),
    Fact(
        "A stream has no cost header, and a decoy of 0.0; the cost is in its last usage.",
        ("chat.completions streamed: priced", "responses streamed: priced"),
    ),
    Fact(
        "A stream says its usage only if told to, and a client's `include_usage: false` defeats "
        "LiteLLM's own setting: Tallygate asks for it always.",
        (
            "chat.completions streamed: usage asked for",
            "chat.completions streamed: usage declined",
            "completions streamed: priced",
        ),
    ),
    Fact(
        "The cost in a stream of messages is that of its last event only: it is not used.",
        ("messages streamed: priced", "messages streamed: cached"),
    ),
    Fact(
        "Free models, unpriced models and answers without a usage look the same.",
        (
            "chat.completions whole: free",
            "chat.completions whole: unpriced",
            "chat.completions whole: no usage",
            "rerank whole: unpriced",
        ),
    ),
    Fact(
        "Moderations never have a cost nor a usage: they are free where their prices are zero.",
        (
            "moderations whole: free",
            "moderations whole: unpriced",
            "moderations whole: priced",
        ),
    ),
    Fact(
        "A hit in LiteLLM's own cache is reported at the full price. Keep that cache off.",
        (
            "chat.completions whole: a hit in LiteLLM's own cache",
            "chat.completions streamed: a hit in LiteLLM's own cache",
        ),
    ),
    Fact(
        "Errors are reported at a cost of 0.",
        ("chat.completions whole: error", "messages streamed: error"),
    ),
    Fact(
        "A margin set up in LiteLLM is in its cost. It is taken out where LiteLLM tells it.",
        (
            "chat.completions whole: a margin in LiteLLM",
            "chat.completions streamed: a margin in LiteLLM",
            "completions streamed: a margin in LiteLLM",
        ),
    ),
    Fact(
        "Where the prices are those of its price map, LiteLLM prices by the name that the "
        "provider returned, which may be another model.",
        (
            "chat.completions whole: priced by the name that the provider returned",
            "chat.completions whole: another model answers",
        ),
    ),
    Fact(
        "A stream that ends early without an error gets a stop and a usage that LiteLLM makes "
        "up; so does one without any usage.",
        (
            "chat.completions streamed: cut",
            "completions streamed: cut",
            "chat.completions streamed: no usage",
            "responses streamed: no usage",
        ),
    ),
    Fact(
        "An error in the middle of a stream comes as an event, under status 200.",
        (
            "chat.completions streamed: error event",
            "messages streamed: error event, then usage",
        ),
    ),
    Fact(
        "When its client hangs up, LiteLLM cancels a stream and tells nobody what it cost. "
        "Tallygate reads on, so LiteLLM never notices.",
        (
            "chat.completions whole: aborted",
            "chat.completions streamed: aborted",
            "chat.completions streamed: aborted, and the rest does not come",
        ),
    ),
    Fact(
        "A provider's own `usage.cost` is repeated as LiteLLM's in a stream.",
        (
            "chat.completions whole: the provider claims a cost",
            "chat.completions streamed: the provider claims a cost",
        ),
    ),
    Fact(
        "In a stream, tokens of sound are charged as text too where the provider counts no text.",
        ("chat.completions streamed: sound without a count of text",),
    ),
    Fact(
        "Cached tokens, of a stream too, and whichever API the model speaks.",
        (
            "chat.completions streamed: cached",
            "chat.completions streamed: a model of the Messages API",
            "messages streamed: a model of the Responses API, cached",
        ),
    ),
    Fact(
        "A model of the Messages API that is called as Responses: LiteLLM's cost knows which "
        "tokens were cached for an hour, and its usage does not. The charge is right, the "
        "mismatch is not.",
        ("responses whole: a model of the Messages API",),
    ),
    Fact(
        "A response that failed has a cost where it is whole, and neither cost nor usage where "
        "it is streamed.",
        ("responses whole: failed", "responses streamed: failed"),
    ),
    Fact(
        "Of speech that is sold by the token LiteLLM's cost has the text and not the sound.",
        (
            "audio.speech whole: by the token",
            "audio.speech whole: by the token, at the prices of LiteLLM's price map",
            "audio.speech whole: by the token, and a price for characters in model_info",
        ),
    ),
    Fact(
        "The cost of a transcription is that of the length which LiteLLM measures in the "
        "customer's file, and which the file may claim.",
        (
            "audio.transcriptions whole: sound that claims to be shorter than it is",
            "audio.transcriptions whole: seconds that the provider rounds up",
        ),
    ),
    Fact(
        "Prices that LiteLLM does not go by: characters of a name that is not in its price map, "
        "tokens of pictures without `gpt-image` in the name, seconds of a file that it can't "
        "read. Our own rating does.",
        (
            "audio.speech whole: priced",
            "images.generations whole: by the token, a name that LiteLLM has no cost for",
            "audio.transcriptions whole: priced",
        ),
    ),
)


def render(lines: Mapping[str, Line]) -> str:
    """Write the page; `lines` are by their name."""
    introduction = (Path(__file__).parent / "introduction.md").read_text()
    parts = [introduction, "## What LiteLLM reports, and the lines that show it\n"]
    parts += [_fact(fact) for fact in FACTS]
    parts.append("\n## The lines\n")
    for endpoint in ENDPOINTS:
        here = [line for line in lines.values() if line.case.endpoint == endpoint]
        here.sort(key=lambda line: line.case.streamed)
        parts.append(f"### `{endpoint}`\n\n{_table(here)}\n")
    return "\n".join(parts)


def _fact(fact: Fact) -> str:
    shown = "; ".join(f"*{name}*" for name in fact.shown_by)
    return f"- {fact.text}\n  Shown by {shown}."


def _table(lines: Sequence[Line]) -> str:
    rows = [
        "| case | answer | model | source | cost | rated | price | status | review | reckoned as |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, settled in lines:
        cells = (
            case.what,
            "streamed" if case.streamed else "whole",
            case.model,
            settled.source,
            settled.cost,
            settled.rated,
            settled.price,
            settled.status,
            settled.review,
            case.reckoned if settled.cost else None,
        )
        rows.append("| " + " | ".join(cell or "" for cell in cells) + " |")
    return "\n".join(rows)
