"""What an operator's choices change: deployments, LiteLLM's settings, a charge for parts."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from proxy.embedded.litellm import LiteLLMChild
from tests.e2e.cost_truth.case import Case, Settled, billed, review
from tests.support.litellm import MASTER_KEY, PROVIDER_KEY, litellm_section
from tests.support.litellm_models import LIMITS, PRICES
from tests.support.provider import FakeProvider, Reply

_DEAR = {"input_cost_per_token": 2e-06, "output_cost_per_token": 2e-05}
# Of two deployments the first gets every request, by its weight.
_DEPLOYMENTS: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    ("two", "openai/two-cheap", {**LIMITS, **PRICES}, 1),
    ("two", "openai/two-dear", {**LIMITS, **_DEAR}, 0),
    ("claude-two", "anthropic/two-cheap", {**LIMITS, **PRICES}, 1),
    ("claude-two", "anthropic/two-dear", {**LIMITS, **_DEAR}, 0),
    # Their prices come from LiteLLM's price map.
    ("mini", "openai/gpt-4o-mini", {}, 1),
    ("tts", "openai/gpt-4o-mini-tts", {}, 1),
    ("tts-by-character", "openai/gpt-4o-mini-tts", {"input_cost_per_character": 1.5e-05}, 1),
    ("gpt-image", "openai/gpt-image-1", {}, 1),
)


class OtherLiteLLM(LiteLLMChild):
    """A LiteLLM as it should not be set up before this service: with a cache and with margins."""

    def __init__(self, provider: FakeProvider, directory: Path) -> None:
        section = litellm_section(provider.url)
        section["model_list"] += [
            {
                "model_name": name,
                "litellm_params": {
                    "model": model,
                    "api_base": provider.root_url if "anthropic" in model else provider.url,
                    "api_key": "os.environ/PROVIDER_KEY",
                    "weight": weight,
                },
                "model_info": info,
            }
            for name, model, info, weight in _DEPLOYMENTS
        ]
        super().__init__(
            section,
            data_dir=directory,
            master_key=MASTER_KEY,
            environ={**os.environ, "PROVIDER_KEY": PROVIDER_KEY},
        )

    def _write_config(self) -> None:
        # What `tallygate up` would never pass on.
        self._child.document["litellm_settings"] |= {
            "cache": True,
            "cache_params": {"type": "local"},
            "cost_margin_config": {"anthropic": 0.1, "cohere": 0.1, "text-completion-openai": 0.1},
        }
        super()._write_config()


def other_cases() -> list[Case]:
    """Return every case that needs a LiteLLM, or a service, of its own."""
    cases = [*_deployments(), *_price_map(), *_cache_hits(), *_margins(), *_drained(), *_charging()]
    return [
        # LiteLLM's cache knows a request by its prompt.
        replace(case, body={**_prompt(case), **case.body}) if case.place == "other" else case
        for case in cases
    ]


def _prompt(case: Case) -> dict[str, Any]:
    message = [{"role": "user", "content": case.name}]
    return {
        "chat.completions": {"messages": message},
        "messages": {"messages": message},
        "responses": {"input": case.name},
        "completions": {"prompt": case.name},
        "embeddings": {"input": case.name},
        "rerank": {"query": case.name},
    }.get(case.endpoint, {})


def _deployments() -> Iterator[Case]:
    case = Case(
        place="other",
        endpoint="chat.completions",
        what="two deployments, the cheaper one answers",
        model="two",
        called="two-cheap",
        reckoned="10 x 0.000001 + 5 x 0.00001",
        settled=billed("0.00006", "0.00012", source="header"),
    )
    yield case
    yield replace(case, streamed=True, settled=billed("0.00006", "0.00012", source="stream"))
    yield replace(
        case,
        endpoint="messages",
        model="claude-two",
        streamed=True,
        settled=billed("0.00006", "0.00012", source="rated"),
    )


def _price_map() -> Iterator[Case]:
    case = Case(
        place="other",
        endpoint="chat.completions",
        what="priced by the name that the provider returned",
        model="mini",
        called="gpt-4o-mini",
        reply=Reply(model="gpt-4o"),
        reckoned="10 x 0.0000025 + 5 x 0.00001, which are the prices of gpt-4o",
        settled=billed(
            "0.000075", "0.00015", source="header", rated="0.0000045", review="cost_mismatch"
        ),
    )
    yield case
    yield replace(
        case,
        streamed=True,
        settled=billed(
            "0.000075", "0.00015", source="stream", rated="0.0000045", review="cost_mismatch"
        ),
    )
    speech = replace(
        case,
        endpoint="audio.speech",
        what="by the token, at the prices of LiteLLM's price map",
        model="tts",
        reply=Reply(),
        reckoned="",
        settled=review("cost_incomplete"),
    )
    yield speech
    yield replace(
        speech,
        what="by the token, and a price for characters in model_info",
        model="tts-by-character",
        reckoned="5 x 0.000015",
        settled=billed("0.000075", "0.00015", source="rated"),
    )
    picture = replace(
        speech,
        endpoint="images.generations",
        what="gpt-image-1 at a quality and a size",
        model="gpt-image",
        called="gpt-image-1",
        body={"quality": "low", "size": "1024x1024"},
        reckoned="10 x 0.000005 + 5 x 0.00004",
        settled=billed("0.00025", "0.0005", source="header"),
    )
    yield picture
    yield replace(
        picture,
        what="gpt-image-1 without a usage",
        reply=Reply(usage={}),
        reckoned="",
        settled=review("price_missing"),
    )


def _cache_hits() -> Iterator[Case]:
    hit = Case(
        place="other",
        endpoint="chat.completions",
        what="a hit in LiteLLM's own cache",
        model="priced",
        times=2,
        settled=review("litellm_cache_hit"),
    )
    for endpoint, model, streams in (
        ("chat.completions", "priced", (False, True)),
        ("completions", "instruct", (False, True)),
        ("responses", "priced", (False, True)),
        # Of whole messages, and of embeddings, LiteLLM says only sometimes that they were hits.
        ("messages", "claude", (True,)),
        ("rerank", "rerank", (False,)),
    ):
        for streamed in streams:
            yield replace(hit, endpoint=endpoint, model=model, streamed=streamed)


def _margins() -> Iterator[Case]:
    case = Case(
        place="other",
        endpoint="chat.completions",
        what="a margin in LiteLLM",
        model="claude",
        reckoned="10 x 0.000001 + 5 x 0.00001",
        settled=billed("0.00006", "0.00012", source="header"),
    )
    yield case
    yield replace(case, streamed=True, settled=billed("0.00006", "0.00012", source="stream"))
    yield replace(case, endpoint="messages")
    yield replace(
        case,
        endpoint="messages",
        streamed=True,
        settled=billed("0.00006", "0.00012", source="rated"),
    )
    completion = replace(
        case,
        endpoint="completions",
        model="instruct",
        reckoned="10 x 0.0000015 + 5 x 0.000002",
        settled=billed("0.000025", "0.00005", source="header"),
    )
    yield completion
    yield replace(
        completion,
        streamed=True,
        reckoned="0.000025 and LiteLLM's margin of a tenth, which nothing tells apart",
        settled=billed(
            "0.0000275", "0.000055", source="stream", rated="0.000025", review="cost_mismatch"
        ),
    )
    yield replace(
        completion,
        endpoint="rerank",
        model="rerank",
        reckoned="0.002 and LiteLLM's margin of a tenth, which nothing tells apart",
        settled=billed("0.0022", "0.0044", source="header", rated="0.002", review="cost_mismatch"),
    )


def _drained() -> Iterator[Case]:
    """The service gives up soon on an answer whose client has left."""
    for endpoint, model in (
        ("chat.completions", "priced"),
        ("completions", "instruct"),
        ("responses", "priced"),
        ("messages", "claude"),
    ):
        case = Case(
            place="other",
            endpoint=endpoint,
            what="aborted, and the rest does not come",
            model=model,
            streamed=True,
            hangs_up="drain",
            settled=review("client_gone"),
        )
        yield case


def _charging() -> Iterator[Case]:
    """The operator has parts of answers charged, by an estimate: a token is four bytes."""
    case = Case(
        place="charging",
        endpoint="chat.completions",
        what="cut by a reset, and parts are charged",
        model="priced",
        streamed=True,
        reply=Reply(cut_after=2, reset=True),
        reckoned="92 bytes of body, 16 of answer: 23 x 0.000001 + 4 x 0.00001",
        settled=_estimated("0.000063", "0.000126"),
    )
    yield case
    yield replace(case, what="error event, and parts are charged", reply=Reply(error_after=2))
    yield replace(
        case,
        endpoint="completions",
        model="instruct",
        reckoned="64 bytes of body, 16 of answer: 16 x 0.0000015 + 4 x 0.000002",
        settled=_estimated("0.000032", "0.000064"),
    )
    yield replace(
        case,
        endpoint="responses",
        reply=Reply(cut_after=6, reset=True),
        reckoned="68 bytes of body, 16 of answer: 17 x 0.000001 + 4 x 0.00001",
        settled=_estimated("0.000057", "0.000114"),
    )
    yield replace(case, endpoint="messages", model="claude", reply=Reply(cut_after=5, reset=True))
    yield replace(
        case,
        model="unpriced",
        what="cut by a reset, unpriced, and parts are charged",
        reckoned="",
        settled=review("price_missing"),
    )


def _estimated(cost: str, price: str) -> Settled:
    return billed(cost, price, source="estimated")
