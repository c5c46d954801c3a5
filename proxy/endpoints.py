"""The endpoints that are metered, each in a description: the relay is the same for all of them.

A description says what bounds a request's cost (`parse`), what its body may hold (`policy`), where
the usage of its answer stands (`answer`, `make_meter`) and what its errors look like (`dialect`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pricing.usage import Usage
from proxy import firewall
from proxy.dialect import Dialect
from proxy.firewall import Policy
from proxy.wire import answer, typed_stream
from proxy.wire.answer import AnswerShape
from proxy.wire.chat_request import OUTPUT_LIMITS, parse_chat_request
from proxy.wire.chat_stream import ChatStreamMeter
from proxy.wire.form import Form
from proxy.wire.media_requests import (
    parse_image_form,
    parse_image_request,
    parse_sound_form,
    parse_speech_request,
)
from proxy.wire.meter import PlainMeter, StreamMeter
from proxy.wire.request import Request
from proxy.wire.text_requests import (
    parse_completion_request,
    parse_embedding_request,
    parse_moderation_request,
    parse_rerank_request,
)
from proxy.wire.typed_requests import parse_messages_request, parse_responses_request
from proxy.wire.typed_stream import TypedStreamMeter


def _chat_meter(request: Request, max_event_bytes: int) -> StreamMeter:
    return ChatStreamMeter(request.include_usage, max_event_bytes)


def _responses_meter(request: Request, max_event_bytes: int) -> StreamMeter:
    return TypedStreamMeter(typed_stream.RESPONSES, max_event_bytes, tells_price=request.live_cost)


def _messages_meter(request: Request, max_event_bytes: int) -> StreamMeter:
    return TypedStreamMeter(typed_stream.MESSAGES, max_event_bytes, tells_price=request.live_cost)


def _plain_meter(_request: Request, _max_event_bytes: int) -> StreamMeter:
    return PlainMeter()


def _nothing(_request: Request) -> Usage | None:
    return None


def _characters(request: Request) -> Usage:
    return Usage(input_characters=request.units["input_characters"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One endpoint.

    Attributes:
        name: what the ledger, the metrics and the price list call it.
        path: where it is, here and at LiteLLM.
        parse: reads a JSON body; None where the body is a form, which `parse_form` reads.
        output_limits: the members that limit an answer's tokens; a limit of ours goes into the
            last of them.
        reports_usage: whether a stream must be told to report its usage.
        is_events: whether a stream is events, and not a file.
        known_usage: what an answer uses whatever it says, where the request says it already.
        takes_provider_key: whether LiteLLM honours the customer's own key there.
        reports_input_cost_only: whether LiteLLM's cost leaves out what the answer takes where that
            is sold by the token.
        reports_measured_cost: whether LiteLLM's cost comes of what it measures in the customer's
            file, so that the provider's own count goes first.
    """

    name: str
    path: str
    policy: Policy
    answer: AnswerShape
    parse: Callable[[bytes], Request] | None = None
    parse_form: Callable[[Form], Request] | None = None
    make_meter: Callable[[Request, int], StreamMeter] = _plain_meter
    dialect: Dialect = Dialect.OPENAI
    output_limits: tuple[str, ...] = ()
    reports_usage: bool = False
    is_events: bool = True
    known_usage: Callable[[Request], Usage | None] = _nothing
    takes_provider_key: bool = True
    reports_input_cost_only: bool = False
    reports_measured_cost: bool = False


_ALL = (
    Endpoint(
        name="chat.completions",
        path="/v1/chat/completions",
        policy=firewall.CHAT,
        parse=parse_chat_request,
        answer=answer.CHAT,
        make_meter=_chat_meter,
        output_limits=OUTPUT_LIMITS,
        reports_usage=True,
    ),
    Endpoint(
        name="completions",
        path="/v1/completions",
        policy=firewall.COMPLETIONS,
        parse=parse_completion_request,
        answer=answer.CHAT,
        make_meter=_chat_meter,
        output_limits=("max_tokens",),
        reports_usage=True,
    ),
    Endpoint(
        name="responses",
        path="/v1/responses",
        policy=firewall.RESPONSES,
        parse=parse_responses_request,
        answer=answer.RESPONSES,
        make_meter=_responses_meter,
        dialect=Dialect.RESPONSES,
        output_limits=("max_output_tokens",),
    ),
    Endpoint(
        name="messages",
        path="/v1/messages",
        policy=firewall.MESSAGES,
        parse=parse_messages_request,
        answer=answer.MESSAGES,
        make_meter=_messages_meter,
        dialect=Dialect.ANTHROPIC,
        output_limits=("max_tokens",),
    ),
    Endpoint(
        name="embeddings",
        path="/v1/embeddings",
        policy=firewall.EMBEDDINGS,
        parse=parse_embedding_request,
        answer=answer.EMBEDDINGS,
    ),
    Endpoint(
        name="moderations",
        path="/v1/moderations",
        policy=firewall.MODERATIONS,
        parse=parse_moderation_request,
        answer=answer.MODERATIONS,
        # LiteLLM takes no notice of it and calls with the operator's key.
        takes_provider_key=False,
    ),
    Endpoint(
        name="rerank",
        path="/v1/rerank",
        policy=firewall.RERANK,
        parse=parse_rerank_request,
        answer=answer.RANKING,
    ),
    Endpoint(
        name="images.generations",
        path="/v1/images/generations",
        policy=firewall.IMAGES,
        parse=parse_image_request,
        answer=answer.PICTURES,
    ),
    Endpoint(
        name="images.edits",
        path="/v1/images/edits",
        policy=firewall.IMAGE_EDITS,
        parse_form=parse_image_form,
        answer=answer.PICTURES,
    ),
    Endpoint(
        name="audio.speech",
        path="/v1/audio/speech",
        policy=firewall.SPEECH,
        parse=parse_speech_request,
        answer=answer.SOUND,
        is_events=False,
        known_usage=_characters,
        reports_input_cost_only=True,
    ),
    Endpoint(
        name="audio.transcriptions",
        path="/v1/audio/transcriptions",
        policy=firewall.SOUND,
        parse_form=parse_sound_form,
        answer=answer.SOUND,
        reports_measured_cost=True,
    ),
    Endpoint(
        name="audio.translations",
        path="/v1/audio/translations",
        policy=firewall.SOUND,
        parse_form=parse_sound_form,
        answer=answer.SOUND,
        reports_measured_cost=True,
    ),
)

ENDPOINTS: Mapping[str, Endpoint] = MappingProxyType({each.path: each for each in _ALL})
