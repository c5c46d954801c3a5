"""The data plane on plain ASGI: what SDKs call, under `/v1` and, as LiteLLM has it, without.

A path that is none of its own answers 404 `unsupported_endpoint`: nothing reaches a provider
unmetered.
"""

import logging
from collections.abc import Callable

from proxy.api.services import Services
from proxy.catalog import Model
from proxy.dialect import Dialect
from proxy.endpoints import ENDPOINTS
from proxy.errors import NotFoundError, TallygateError
from proxy.exchange import Exchange, Receive, Scope, Send
from proxy.principals import may_use_model

log = logging.getLogger(__name__)

_VERSION = "/v1"
_MODELS = "/v1/models"
_STORED = "/v1/responses/"
_COUNT = "/v1/messages/count_tokens"
# The first words of all paths, for requests that leave the version out.
_ROOTS = frozenset({path.split("/")[2] for path in ENDPOINTS} | {"models"})


def is_data_plane(path: str) -> bool:
    """Whether a path is the data plane's, with or without its version."""
    first = path.split("/", 2)[1]
    return first == "v1" or first in _ROOTS


class DataPlane:
    """Routes the requests of SDKs."""

    def __init__(self, services: Services) -> None:
        self._relay = services.relay
        self._unmetered = services.unmetered
        self._principals = services.principals
        self._catalog = services.catalog
        self._switches = services.switches
        self._stall_timeout_s = services.client_stall_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, as ASGI has it."""
        exchange = Exchange(scope, receive, send, stall_timeout_s=self._stall_timeout_s)
        path: str = scope["path"]
        if not path.startswith(_VERSION + "/"):
            path = _VERSION + path
        try:
            endpoint = ENDPOINTS.get(path)
            if endpoint is not None and scope["method"] == "POST":
                await self._relay.serve(exchange, endpoint)
            else:
                await self._other(exchange, scope["method"], path)
        except TallygateError as error:
            # The answer had begun and can't be completed: the server breaks the connection off,
            # which tells every SDK that what it has is not whole.
            log.warning(
                "answer broken off",
                extra={"request_id": exchange.request_id, "code": error.code},
            )
            raise
        except Exception:
            log.exception("request failed", extra={"request_id": exchange.request_id})
            if exchange.status is not None:
                raise
            message = "The request failed here. It is not charged; an operator will look at it."
            await exchange.respond_error(TallygateError(message))
        finally:
            exchange.stop_watching()

    async def _other(self, exchange: Exchange, method: str, path: str) -> None:
        try:
            if method == "GET" and path == _MODELS:
                await exchange.respond_json(200, await self._models(exchange))
            elif method == "GET" and path.startswith(_MODELS + "/"):
                name = path.removeprefix(_MODELS + "/")
                await exchange.respond_json(200, await self._model(exchange, name))
            elif method in {"GET", "DELETE"} and path.startswith(_STORED):
                await self._unmetered.stored_answer(exchange, method, path.removeprefix(_STORED))
            elif method == "POST" and path == _COUNT:
                await self._unmetered.count_tokens(exchange)
            else:
                message = (
                    f"{path} takes POST, not {method}."
                    if path in ENDPOINTS
                    else f"{method} {path} is not offered here. GET /openapi.json lists what is, "
                    f"and GET {_MODELS} the models."
                )
                raise NotFoundError(message, code="unsupported_endpoint")
        except TallygateError as error:
            await exchange.respond_error(error)

    async def _models(self, exchange: Exchange) -> dict[str, object]:
        show = _shape(exchange)
        principal = await self._principals.authenticate(exchange, needs="read", fresh=True)
        switched = await self._switches.refresh()
        shown = [
            show(model)
            for model in self._catalog.all()
            if may_use_model(principal, model.name)
            and switched.find(model.name, model.providers) is None
        ]
        if exchange.dialect is Dialect.ANTHROPIC:
            ids = [model["id"] for model in shown] or [None]
            return {"data": shown, "has_more": False, "first_id": ids[0], "last_id": ids[-1]}
        return {"object": "list", "data": shown}

    async def _model(self, exchange: Exchange, name: str) -> dict[str, object]:
        show = _shape(exchange)
        principal = await self._principals.authenticate(exchange, needs="read", fresh=True)
        model = self._catalog.get(name)
        if model is None or not may_use_model(principal, name):
            message = f"The model {name!r} does not exist here, or this key may not use it."
            raise NotFoundError(message, code="model_not_found", param="model")
        (await self._switches.refresh()).check(name, model.providers)
        return show(model)


def _shape(exchange: Exchange) -> Callable[[Model], dict[str, object]]:
    """Anthropic's SDKs name their version of the API, and read models in a shape of their own."""
    if exchange.header(b"anthropic-version") is None:
        return _as_openai
    exchange.dialect = Dialect.ANTHROPIC
    return _as_anthropic


def _as_anthropic(model: Model) -> dict[str, object]:
    return {
        "type": "model",
        "id": model.name,
        "display_name": model.name,
        "created_at": "1970-01-01T00:00:00Z",
    }


def _as_openai(model: Model) -> dict[str, object]:
    # LiteLLM does not say when a model was made; OpenAI's clients require a number.
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": model.provider or "tallygate",
    }
